"""Everything around what is learned: settings, data, training loop, checkpoints, evaluation, report.

Each folder names in its own docstring what is in it; `interfaces` has the types through which utils/ sees models/.

- `config`: settings, recipes, the command line.
- `machine`, `parallel`: hardware, memory and packages; several processes and sharded weights.
- `data`, `teacher_cache`: text as windows and batches; teacher distributions kept on disk.
- `pretrained`: models and tokenizers, loaded and exported.
- `served`: a teacher behind a server.
- `captures`: a teacher whose answers are stored, in DistillKit's format.
- `forecast`: memory and disk that a run will need, and the batch size that fits.
- `training`: the loop, the optimizer, checkpoints.
- `evaluation`, `report`: measurements, and the pages, charts and cards about them.
- `logs`: console, log file, metrics, trackers.
- `run`: the folder of a run, exit codes, export and upload, the first run on a machine.
- `checks`: self-checks of this program and this machine.
"""
