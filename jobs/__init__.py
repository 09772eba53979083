"""Jobs that run as they are; installed as ``latentmill.jobs``."""
