"""The tasks by name. A new task is one line here and one file (docs/guides/adding_a_task.md)."""

# Name -> the class, as module and name. A class is imported when its task is used: configurations need the names, and tasks need the
# configurations. `jpeft.tasks.task.find_task` looks a task up.
TASKS: dict[str, str] = {
    "sequence-classification": "jpeft.tasks.sequence_classification.SequenceClassification",
    "token-classification": "jpeft.tasks.tagging.TokenClassification",
    "generation": "jpeft.tasks.generation.Generation",
}
