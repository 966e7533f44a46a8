"""The program's commands, one module each, whose ``run(args)`` returns the exit code."""

MODULES = {
    "train": "sparsenet.commands.train",
    "eval": "sparsenet.commands.evaluate",
    "predict": "sparsenet.commands.predict",
    "serve": "sparsenet.commands.serve",
    "export": "sparsenet.commands.export",
    "models": "sparsenet.commands.models",
    "report": "sparsenet.commands.report",
    "check": "sparsenet.commands.check",
}
