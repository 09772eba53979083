"""``pytest --processes 3``: three processes run what one has collected.

They are forked from it when all is imported and collected, which takes half a minute. Each asks for the next file of tests when it
begins the last test of one. What they report comes to the process that collected, as if it had run all tests itself.
"""

import atexit
import os
import pickle
import random
import signal
import sys
import traceback
from collections import deque
from itertools import chain, count, groupby, pairwise
from multiprocessing import Pipe
from multiprocessing.connection import wait

import pytest


def pytest_addoption(parser):
    parser.addoption("--processes", type=int, default=1, help="how many processes run the tests")


def pytest_runtestloop(session):
    option = session.config.option
    failed = session.testsfailed and not option.continue_on_collection_errors
    if option.processes > 1 and not option.collectonly and not failed:
        Run(session).run(option.processes)
        return True


def shared(base):
    """The folder for what all processes of a run share. ``base`` is pytest's for this process."""
    return base.parent if base.name.startswith("process-") else base


class Process:
    """A forked process, and the places in ``session.items`` that it was given. When it has begun, the first is of the test that it runs."""

    def __init__(self, session, name, others):
        self.places, self.begun = deque(), False
        self.connection, theirs = Pipe()
        sys.stdout.flush(), sys.stderr.flush()
        self.number = os.fork()
        if not self.number:
            for connection in (self.connection, *others):
                connection.close()
            work(session, theirs, name)
        theirs.close()

    def ended(self):
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


class Run:
    """Of tests, as the process sees it that collected them."""

    def __init__(self, session):
        self.session, self.config = session, session.config
        self.base = self.config._tmp_path_factory.getbasetemp()  # made before any process asks
        places = groupby(range(len(session.items)), lambda place: session.items[place].path)
        self.files = deque(list(places) for _, places in places)
        self.processes, self.names = {}, count()

    def run(self, number):
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if terminal:
            terminal.showfspath = False  # tests of several files come in turn
        try:
            for _ in range(min(number, len(self.files))):
                self.start()
            while self.processes:
                for connection in wait(self.processes):
                    self.hear(connection)
                if self.session.shouldfail:
                    raise self.session.Failed(self.session.shouldfail)
                if self.session.shouldstop:
                    raise self.session.Interrupted(self.session.shouldstop)
        finally:
            for connection in self.processes:
                connection.close()  # which ends a process when the test ends that it runs
            for process in self.processes.values():
                process.ended()

    def start(self):
        process = Process(self.session, f"process-{next(self.names)}", self.processes)
        self.processes[process.connection] = process

    def hear(self, connection):
        process = self.processes[connection]
        try:
            said, told = connection.recv()
        except (EOFError, ConnectionError):
            del self.processes[connection]
            connection.close()
            return self.after(process)
        if said == "next":
            places = self.files.popleft() if self.files else []
            process.places.extend(places)
            connection.send(places)
        elif said == "begin":
            process.begun = True
            while process.places[0] != told:
                process.places.popleft()
        elif said == "end":
            process.places.clear()
        elif said == "pytest_warning_recorded":
            self.config.hook.pytest_warning_recorded.call_historic(kwargs=told)
        elif said == "pytest_runtest_logreport":
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=told["report"])
            self.config.hook.pytest_runtest_logreport(report=report)
        else:
            self.config.hook.pytest_runtest_logfinish(**told)

    def after(self, process):
        """The test in which a process ended failed, and another process goes on with the next."""
        how = process.ended()
        if not process.places:
            return
        if not process.begun:
            raise RuntimeError(f"A process of tests ended before its first: {how}.")
        item = self.session.items[process.places.popleft()]
        text = f"The process of this test ended: {how}."
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
        self.config.hook.pytest_runtest_logreport(report=report)
        self.config.hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if process.places:
            self.files.appendleft(list(process.places))
        if self.files:
            self.start()


def work(session, connection, name):
    """Be a process that runs tests, to its end."""
    code = 1
    try:
        become(session.config, name)
        reports = Reports(session.config)
        session.config.pluginmanager.register(reports)  # and told of all earlier warnings
        reports.connection = connection
        try:
            for place, following in pairwise(chain(given(connection), [None])):
                connection.send(("begin", place))
                item, nextitem = session.items[place], None if following is None else session.items[following]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            connection.send(("end", None))
        except (KeyboardInterrupt, EOFError, ConnectionError):  # nobody waits for more
            session._setupstate.teardown_exact(None)
        atexit._run_exitfuncs()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def given(connection):
    """The place of each test of each file that is given to this process."""
    places = None
    while places is None or places:
        connection.send(("next", None))
        places = connection.recv()
        yield from places


def become(config, name):
    """A folder, streams and random numbers of its own; and silence, for the collecting process speaks."""
    factory = config._tmp_path_factory
    factory._basetemp = factory.getbasetemp() / name
    factory._basetemp.mkdir(mode=0o700)
    captures = config.pluginmanager.getplugin("capturemanager")
    captures.stop_global_capturing()
    captures.start_global_capturing()
    captures.suspend_global_capture()
    if config.pluginmanager.hasplugin("terminalreporter"):
        config.get_terminal_writer()._file = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    random.seed()


class Reports:
    """What the hooks of a process are told, the collecting process's are told, too."""

    def __init__(self, config):
        self.config, self.connection = config, None

    def tell(self, hook, **told):
        if self.connection:
            self.connection.send((hook, told))

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.tell("pytest_runtest_logreport", report=data)

    def pytest_runtest_logfinish(self, nodeid, location):
        self.tell("pytest_runtest_logfinish", nodeid=nodeid, location=location)

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        try:
            pickle.dumps(warning_message)
        except Exception:  # whatever a library put into it
            warning_message.message = UserWarning(str(warning_message.message))
            warning_message.category, warning_message.source = UserWarning, None
        self.tell(
            "pytest_warning_recorded", warning_message=warning_message, when=when, nodeid=nodeid, location=location
        )
