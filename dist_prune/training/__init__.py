"""Training: loop.py (the one loop), train.py (a whole training), objective.py (what is minimised), optim.py (timm's
optimizers and schedules), states.py (checkpoints)."""
