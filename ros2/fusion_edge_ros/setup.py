"""The package as colcon builds it."""

from setuptools import setup

NAME = "fusion_edge_ros"

setup(
    name=NAME,
    version="0.1.0",
    description="A node that answers questions about camera frames with a FUSION vision-language model",
    license="Apache-2.0",
    maintainer="fusion-edge developers",
    maintainer_email="fusion-edge@example.org",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/config", ["config/fast_dds.xml", "config/fusion_edge.yaml"]),
        (f"share/{NAME}/launch", ["launch/fusion_edge.launch.py"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    entry_points={"console_scripts": [f"fusion_edge_node = {NAME}.main:main"]},
)
