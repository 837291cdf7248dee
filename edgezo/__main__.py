"""``python -m edgezo`` is ``edgezo``."""

from edgezo.cli.main import main

if __name__ == "__main__":
    main()
