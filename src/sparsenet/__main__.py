"""``python -m sparsenet``, as launchers such as torchrun start the program."""

from sparsenet.cli import main

main()
