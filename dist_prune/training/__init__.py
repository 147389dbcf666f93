"""Training, evaluation and timing of networks.

loop.py has the one training loop, trainer.py a whole training, loss.py the loss, optim.py timm's optimizers and
schedules, checkpoints.py the checkpoints, evaluation.py accuracy, latency.py measured times.
"""
