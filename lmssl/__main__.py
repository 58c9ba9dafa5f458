"""`python -m lmssl`, and so `accelerate launch -m lmssl ...` and `torchrun -m lmssl ...`."""

from lmssl.cli import main

if __name__ == "__main__":
    main()
