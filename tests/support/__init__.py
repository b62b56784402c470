"""What several tests share: servers, small networks, image files."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
