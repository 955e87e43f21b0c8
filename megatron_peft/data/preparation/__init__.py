"""From the public files of a benchmark to training files and task files.

A reader makes documents of a benchmark's own files; a template (an lm-evaluation-harness task, in `tasks/`) says how a
document is asked and answered, in training as in evaluation; `prepare` splits, checks and writes.
"""
