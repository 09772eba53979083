"""Where jobs can be started: a process of its own here, Ray's job server, Slurm, KubeRay, SkyPilot. Each is a plugin, as anyone's would be."""
