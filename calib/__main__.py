"""``python -m calib``, and ``torchrun ... -m calib``."""

from calib.cli import main

if __name__ == "__main__":
    main()
