"""The same driver on virtual time: machines that die, hang and come, a store that fails, drivers that share. From one seed.

    python -m tests.simulation --seeds 1000          # seeds 0 to 999
    python -m tests.simulation --seed 417            # one of them again, with what happened

What runs is ours: ``driver.loop.turn``, the decisions, the leases and the commit of ``write.publish``. What is made up is the world: nodes,
workers, blocks, a store in memory, and a clock. After every event it is checked that each row of an open shard is in
exactly one place, that no queue grows beyond its bound, that no block is missed that is still wanted, and that what is in
the store is whole, right and never changes. Troubles end after a while, except for rows that can't be done; then all must
be finished: each row is ok, failed or filtered, once. In some of a driver's lives a whole stage does nothing right: then
no row may be blamed, or as few as the driver promises where the dataset shows that the stage has worked before.
"""
