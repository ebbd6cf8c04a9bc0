"""Pipeline parallelism: which layers a stage holds, in which order it runs, what it exchanges.

Our own 1F1B schedule over plain modules, with DeepSpeed's engine under each stage: parameter names
stay canonical, so every checkpoint is of one form (docs/decisions/0070-own-pipeline-schedule.md).
"""
