"""``python -m fusion_edge_ros`` runs the node, also where colcon has not installed it."""

import sys

from fusion_edge_ros.main import main

sys.exit(main())
