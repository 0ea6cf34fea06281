"""Load a bundle and ask questions about images.

with load("bundle") as fusion:
    for piece in fusion.ask("frame.jpg", "Is the path clear?"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import os

from fusion_edge.runtime.arguments import check_flag, check_integer
from fusion_edge.runtime.backends.devices import AUTO, open_device
from fusion_edge.runtime.bundle.reader import Bundle, open_bundle
from fusion_edge.runtime.fusion import Fusion
from fusion_edge.runtime.hub.bundle_source import find_bundle
from fusion_edge.runtime.system.mapped_files import LockedFiles, mapped_ranges, read_in
from fusion_edge.runtime.system.progress import Progress
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
    preload: bool = False,
    lock_memory: bool = False,
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
        spin: Whether idle CPU threads spin for tens of milliseconds, as ONNX Runtime's do by default, in place of
            0.1 ms. It takes processors from everything else. TensorRT has no such threads and refuses it.
        preload: Whether to read in the weights that stay in files, with progress on a terminal, so that the first
            question does not wait for them. On a GPU this is the token table alone: other weights lie in its memory.
        lock_memory: Whether to preload those weights and keep their pages in memory until :meth:`Fusion.close`, so that
            other programs do not evict them. The limit is ``ulimit -l``.
        cached_images: Limit of cached images and scenes: one a camera, so that cameras do not evict each other's.
            ``fusion-info`` gives their bytes.

    Returns:
        The loaded model. Use it as a context manager, or call :meth:`Fusion.close`.

    Raises:
        UsageError: An argument has a wrong type or is out of range.
        FusionError: The machine lacks the device, the hub cannot provide the bundle, or the bundle is damaged, has a
            newer schema, or does not load; or the weights cannot be preloaded, or this process may not lock them.
    """
    count = None if threads is None else check_integer("threads", threads, 1, "an integer from 1, or None")
    if count is not None:
        check_threads(count)
    spins, preloads, locks = (
        check_flag(name, value) for name, value in (("spin", spin), ("preload", preload), ("lock_memory", lock_memory))
    )
    images = check_integer("cached_images", cached_images, 1, "an integer from 1")
    bundle = open_bundle(find_bundle(folder, revision).folder)
    chosen, backend = open_device(bundle, device, count, spins)
    fusion = Fusion(bundle.manifest, backend, load_tokenizer(bundle), Embeddings(bundle), chosen, images)
    if preloads or locks:
        try:
            _preload(bundle, fusion, locks)
        except BaseException:
            fusion.close()
            raise
    return fusion


def _preload(bundle: Bundle, fusion: Fusion, locks: bool) -> None:
    """Read in the weights that the model maps, and lock them until it is closed."""
    ranges = mapped_ranges(bundle.folder / entry.path for entry in bundle.manifest.files)
    locked = LockedFiles(ranges) if locks else None  # first: a refusal need not wait for the weights
    with Progress("Preloading", sum(mapped.size for mapped in ranges)) as progress:
        read_in(ranges, progress.advance)
    if locked is not None:
        fusion.queue.when_freed(locked.release)
        locked.lock()
