"""What surrounds the paper: settings, the run, processes, checkpoints, evaluation, drawings, export."""
