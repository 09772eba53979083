"""Our commands, each in a file of its name, in the order of ``--help``. None imports torch, Hydra or Ray before it is called."""

from latentmill.commands.cancel import CANCEL_COMMAND
from latentmill.commands.comfy import COMFY_COMMAND
from latentmill.commands.doctor import DOCTOR_COMMAND
from latentmill.commands.export import EXPORT_COMMAND
from latentmill.commands.jobs import JOBS_COMMAND
from latentmill.commands.listings import PLUGINS_COMMAND, SCHEDULERS_COMMAND
from latentmill.commands.logs import LOGS_COMMAND
from latentmill.commands.plan import PLAN_COMMAND
from latentmill.commands.push import PUSH_COMMAND
from latentmill.commands.run import RUN_COMMAND
from latentmill.commands.status import STATUS_COMMAND
from latentmill.commands.submit import SUBMIT_COMMAND
from latentmill.commands.top import TOP_COMMAND
from latentmill.commands.verify import VERIFY_COMMAND

COMMANDS = (
    RUN_COMMAND,
    PLAN_COMMAND,
    SUBMIT_COMMAND,
    JOBS_COMMAND,
    LOGS_COMMAND,
    CANCEL_COMMAND,
    DOCTOR_COMMAND,
    COMFY_COMMAND,
    STATUS_COMMAND,
    TOP_COMMAND,
    VERIFY_COMMAND,
    EXPORT_COMMAND,
    PUSH_COMMAND,
    PLUGINS_COMMAND,
    SCHEDULERS_COMMAND,
)
