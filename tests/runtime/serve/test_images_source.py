"""From a request's URL to a picture."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from support.concurrency import Concurrency

from fusion_edge.runtime.images.encoded import DecodedImage
from fusion_edge.runtime.images.image_files import FORMATS
from fusion_edge.runtime.images.preprocessing import cut_crops, load_image
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.images import ImageLimits, ImageSource, LoadedImage, source
from fusion_edge.runtime.serve.images.https import HttpsFetcher
from fusion_edge.runtime.serve.picture_url import PictureUrl

PARAM = "messages[0].content[1].image_url.url"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def load(url: str, limits: ImageLimits | None = None, fetcher: HttpsFetcher | None = None) -> LoadedImage:
    limits = limits or ImageLimits()
    images = ImageSource(limits, fetcher)
    try:
        return asyncio.run(images.load(PictureUrl(url), PARAM))
    finally:
        images.close()


def refused(url: str, limits: ImageLimits | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        load(url, limits)
    error = caught.value
    assert (error.status, error.param) == (400, PARAM)
    assert "\n" not in error.message
    return error


CROPS = (5, 384, 384, 3)
SMALL = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str, tmp_path: Path) -> None:
    data = encoded(SMALL, kind)
    (tmp_path / "file").write_bytes(data)
    loaded = load(data_url(data))
    assert np.array_equal(loaded.crops, cut_crops(load_image(tmp_path / "file")))
    assert loaded.digest == hashlib.sha256(data).hexdigest()


def odd_pictures() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    gray = Image.fromarray(np.arange(0, 60000, 3000, dtype=np.uint16).reshape(4, 5))
    return {
        "16 bits": encoded(gray),
        "CMYK": encoded(SMALL.convert("CMYK"), "JPEG"),
        "palette with transparency": encoded(SMALL.convert("P"), transparency=0),
        "alpha": encoded(SMALL.convert("RGBA")),
        "animated": encoded(SMALL, "GIF", save_all=True, append_images=[SMALL.rotate(180)]),
        "turned": encoded(SMALL, "JPEG", exif=exif),
        "16-bit PGM": encoded(gray, "PPM"),
        "compressed TIFF": encoded(SMALL, "TIFF", compression="tiff_deflate"),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_decode_as_files_do(name: str, tmp_path: Path) -> None:
    data = odd_pictures()[name]
    (tmp_path / "file").write_bytes(data)
    assert np.array_equal(load(data_url(data)).crops, cut_crops(load_image(tmp_path / "file")))


@pytest.mark.parametrize("data", [b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", encoded(SMALL)[:45], bytes(100)])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert refused(data_url(data)).code == "invalid_image"


def test_the_limit_of_pixels_is_exact_and_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ImageLimits(max_pixels=20)
    assert load(data_url(encoded(SMALL)), limits).crops.shape == CROPS
    for kind in FORMATS:
        error = refused(data_url(encoded(Image.new("RGB", (21, 1)), kind)), limits)
        assert (error.code, "21 x 1 pixels, more than the limit of 20" in error.message) == ("invalid_image", True)


def test_the_limit_of_bytes() -> None:
    assert refused(data_url(bytes(101)), ImageLimits(max_bytes=100)).code == "image_too_large"


@pytest.mark.parametrize(
    "url",
    [
        *("https://images.example.com/x.png", "http://images.example.com/x.png", "file:///etc/passwd", "picture.png"),
        *("", " ", "/etc/passwd", "ftp://a.example/", "blob:https://a.example/1", "\\\\host\\share", "data"),
    ],
)
def test_only_data_urls_by_default(url: str) -> None:
    error = refused(url)
    assert error.code == "image_url_not_allowed"
    assert error.message == (
        "The picture's URL is not a data: URL such as data:image/png;base64,..., and the server opens no others."
    )


def test_a_folder_does_not_open_hosts_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(SMALL))
    folder, hosts = ImageLimits(folder=tmp_path), ImageLimits(hosts=("images.example.com",))
    assert load("a.png", folder).crops.shape == CROPS
    assert load(f"file://{tmp_path}/a.png", folder).digest == load(data_url(encoded(SMALL))).digest
    assert refused("https://images.example.com/a.png", folder).code == "image_url_not_allowed"
    assert refused("a.png", hosts).code == "image_url_not_allowed"
    assert refused("https://other.example.com/a.png", hosts).code == "image_url_not_allowed"


def test_a_fetched_picture_is_decoded() -> None:
    limits = ImageLimits(hosts=("images.example.com",))

    class Fetcher(HttpsFetcher):
        async def fetch(self, url: str) -> bytes:
            assert url == "HTTPS://images.example.com/a"
            return encoded(SMALL)

    assert load("HTTPS://images.example.com/a", limits, Fetcher(limits)).crops.shape == CROPS


def test_fetches_are_bounded() -> None:
    limits = ImageLimits(hosts=("images.example.com",), fetches=2)
    fetches = Concurrency()

    class Fetcher(HttpsFetcher):
        async def fetch(self, url: str) -> bytes:
            with fetches:
                await asyncio.sleep(0.01)
            return encoded(SMALL)

    async def main() -> None:
        images = ImageSource(limits, Fetcher(limits))
        url = "https://images.example.com/a"
        await asyncio.gather(*(images.load(PictureUrl(url), PARAM) for _ in range(8)))
        images.close()

    asyncio.run(main())
    assert fetches.most == 2


def test_decodes_are_bounded_also_when_requests_are_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Concurrency()

    def decode(data: bytes, max_pixels: int) -> DecodedImage:
        with threads:
            time.sleep(0.02)
        return DecodedImage(SMALL, None)

    monkeypatch.setattr(source, "decode", decode)

    async def main(cancel: Callable[[asyncio.Task[LoadedImage]], object]) -> None:
        images = ImageSource(ImageLimits(decodes=2))
        tasks = [asyncio.create_task(images.load(PictureUrl(data_url(b"x")), PARAM)) for _ in range(12)]
        await asyncio.sleep(0.01)
        for task in tasks[:6]:
            cancel(task)
        await asyncio.gather(*tasks, return_exceptions=True)
        images.close()

    asyncio.run(main(lambda task: None))
    assert threads.most == 2
    asyncio.run(main(lambda task: task.cancel()))
    assert threads.most == 2


def test_limits_can_be_pickled(tmp_path: Path) -> None:
    limits = ImageLimits(hosts=("a.example.com",), folder=tmp_path)
    assert pickle.loads(pickle.dumps(limits)) == limits
