"""Load a bundle and ask questions about images.

with load("bundle") as fusion:
    for piece in fusion.ask("frame.jpg", "Is the path clear?"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import os

from fusion_edge.runtime.arguments import check_flag, check_integer
from fusion_edge.runtime.backends.devices import AUTO, open_device
from fusion_edge.runtime.bundle.reader import open_bundle
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.hub.bundle_source import find_bundle
from fusion_edge.runtime.system.resources import check_threads
from fusion_edge.runtime.tokenization.embeddings import Embeddings
from fusion_edge.runtime.tokenization.tokenizer import load_tokenizer


def load(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str = AUTO,
    threads: int | None = None,
    spin: bool = False,
    cached_images: int = 1,
) -> Fusion:
    """Load a bundle.

    Args:
        folder: Folder that ``fusion-export`` wrote, or a hub id ``org/name``, which is downloaded once. A folder of
            that name wins. A path object is always a folder.
        revision: Branch, tag or commit of a hub id. Default: its default branch. If the hub does not answer, the
            latest download of the branch is used. A commit that has been downloaded needs no network.
        device: ``tensorrt``, ``tensorrt-rtx``, ``cuda``, ``cpu``, or ``auto`` for the best device that this machine
            has for the bundle. A device chosen by name is never replaced by another. :attr:`Fusion.device` gives the
            chosen device, and the reasons against better ones.
        threads: CPU threads. Default: every processor that this process may use, which is also the limit.
        spin: Whether idle CPU threads spin for up to a millisecond instead of going to sleep. It takes processors from
            everything else, and is no faster in general. TensorRT has no such threads and refuses it.
        cached_images: Limit of cached images and scenes: one a camera, so that cameras do not evict each other's.
            ``fusion-info`` gives their bytes.

    Returns:
        The loaded model. Use it as a context manager, or call :meth:`Fusion.close`.

    Raises:
        UsageError: An argument has a wrong type or is out of range.
        FusionError: The machine lacks the device, the hub cannot provide the bundle, or the bundle is damaged, has a
            newer schema, or does not load.
    """
    count = None if threads is None else check_integer("threads", threads, 1, "an integer from 1, or None")
    if count is not None:
        check_threads(count)
    spins = check_flag("spin", spin)
    images = check_integer("cached_images", cached_images, 1, "an integer from 1")
    bundle = open_bundle(find_bundle(folder, revision).folder)
    chosen, backend = open_device(bundle, device, count, spins)
    return Fusion(bundle.manifest, backend, load_tokenizer(bundle), Embeddings(bundle), chosen, images)
