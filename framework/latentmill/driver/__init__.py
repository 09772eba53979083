"""The driver: which batch goes where next, and what becomes of what goes wrong.

``decide(state)`` says what to dispatch. ``apply(state, event)`` takes in what happened. Both change the state that they are
given and touch nothing else: no Ray, no clock, no file, no tensor. So the same events give the same decisions on a cluster,
in one process and in a simulation. ``loop`` brings the two together with a pool of workers and the leases.

What goes wrong climbs a ladder:

1. A batch that raised is tried again, as often as its stage's ``retries`` say.
2. It is split into halves, down to the row.
3. A row that fails alone is a *suspect*. It is *quarantined* (it ends in the error table) once its worker does something else right.
4. Batches that fail on one worker, without a common row and with no success in between, are *consecutive failures*. After
   three it is the worker: it is replaced, and others try its suspects again.
5. A worker's *death* makes all that it held suspect. Each batch is tried again alone, unless the worker's node went with it.
6. Deaths over different rows, with no batch done in between, end the job: it is the stage.

A stage has *worked* once it has done a row, or filtered one. Until then none of its rows is quarantined for an exception or a death: suspects
wait. If nothing else is left to do, the stage has failed, and the job ends. Two things are a stage's fault at once: it can't
load its weights, and its plugin breaks the contract. A row that a stage *rejects*, with a reason, is the row's own fault.
A *store* that is read from and fails is nobody's: after the stage's retries, each of which is many of the store's client, the job ends.

=============  ===================================================================================================
messages       orders and events, and what a block and a slice are
state          all that the driver knows
waiting        the rows before a stage, and the workers that can be given some, found without a search
limits         how big a queue may get, how many rows may fail, how often a worker or a node may be lost
replicas       how many workers of each type there are, found as the job runs
decide         what to start, to dispatch and to claim now
apply          what an event changes
ended          how a row ends that is not stored, failed or filtered, and how one begins again
failures       the ladder
leases         which driver works on which shard; what happens to leases on Ctrl-C
loop           decide, dispatch, collect, until all is done
=============  ===================================================================================================
"""
