"""Processes of a run: rendezvous, collectives, device, preemption, distributed jobs, and tensor files."""
