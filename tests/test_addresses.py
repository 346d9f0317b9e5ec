"""What is secret in an address is never shown, however it is written and whoever writes it."""

from __future__ import annotations

import json
import logging
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xr_ginet.sentinel2.addresses import Address, gdal_path, public_url, without_secrets

SECRET = "TOPSECRET"
ADDRESSES = [
    f"https://me:{SECRET}@blobs.example/data/B05.tif",
    f"https://{SECRET}@blobs.example/data/B05.tif",
    f"https://me:a/{SECRET}@blobs.example/data/B05.tif",
    f"https://blobs.example:8080/data/B05.tif?sig={SECRET}",
    f"https://blobs.example/data/B05.tif?name=d'or&sig={SECRET}",
    f'https://blobs.example/data/B05.tif?name="x"&sig={SECRET}',
    f"https://blobs.example/data/B05.tif?a=b c&sig={SECRET}",
    f"https://blobs.example/data/B05.tif?{SECRET}=",
    f"https://blobs.example/data/B05.tif#access_token={SECRET}",
    f"s3://key:{SECRET}@bucket/data/B05.tif",
]
TELLINGS = [
    "{whole}",
    "Error opening '{whole}': HTTP 403",
    "RasterioIOError('{whole}: No such file or directory')",
    'cannot connect to "{whole}", retrying.',
    "(see <{whole}>)",
    "/vsicurl/{whole}: 403",
    "Max retries exceeded with url: {tail} (Caused by NewConnectionError(1))",
    '{{"href":"{whole}","n":2}} is wrong',
]


@pytest.mark.parametrize("whole", ADDRESSES)
@pytest.mark.parametrize("telling", TELLINGS)
def test_texts_about_an_address_lose_what_is_secret_in_it(whole: str, telling: str) -> None:
    tail = "/" + whole.partition("://")[2].partition("/")[2] if "@" not in whole else "/data/B05.tif"
    text = telling.format(whole=whole, tail=tail)
    shown = without_secrets(text)
    assert SECRET not in shown
    assert "B05.tif" in shown
    assert "bucket" in shown or "blobs.example" in shown or "{whole}" not in telling
    assert without_secrets(shown) == shown


@pytest.mark.parametrize("whole", ADDRESSES)
def test_an_address_shows_itself_without_secrets_by_any_way(whole: str) -> None:
    address = Address(whole)
    shown = [
        str(address), repr(address), f"{address}", f"{address!r}", f"{address:>90}", "%s %r" % (address, address),  # noqa: UP031
        json.dumps({"href": address}), str([address]), address + "", "".join([address]), str(KeyError(address)),
    ]  # fmt: skip
    assert not any(SECRET in text for text in shown)
    assert all("B05.tif" in text for text in shown)
    assert pickle.loads(pickle.dumps(address)).reveal() == address.reveal() == whole
    assert SECRET not in public_url(whole)


def test_addresses_that_look_alike_are_not_the_same() -> None:
    first, second = (Address(f"https://a.example/B05.tif?day={day}") for day in (1, 2))
    assert str(first) == str(second)
    assert first != second
    assert len({first, second, Address("https://a.example/B05.tif?day=1")}) == 2
    assert first.token != second.token


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.text("abcXYZ019-._~%+'\"(),;:!*[]{}|", min_size=8, max_size=20),
    st.sampled_from(["https://{}@h.example/p", "https://u:{}@h.example/p", "https://h.example/p?sig={}&x=1"]),
    st.sampled_from(["failed for {url}", "'{url}': 403", "{secret} was refused", "a {url} b {secret} c", "({url})"]),
)
@example("%3Fsig%3D", "https://h.example/p?sig={}&x=1", "{secret} was refused")
def test_a_known_secret_does_not_show_anywhere_in_a_text(secret: str, where: str, text: str) -> None:
    url = where.format(secret)
    assert secret not in without_secrets(text.format(url=url, secret=secret), url)


@pytest.mark.parametrize(
    "text",
    [
        "item S2A, asset 'blue': http://127.0.0.1:8080/a@b/B02.tif holds float32; its item says uint16",
        "bbox=(0, 1, 2, 3): what? no=1 why? Type offset=0 or offset=-1000",
        "the store is at s3://bucket/cube.zarr, and its key is 'time'",
        "KeyError: 'band_id'",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "name", ["rasterio._env", "rasterio._err", "urllib3.connectionpool", "pystac_client.stac_api_io"]
)
def test_logs_of_libraries_hold_no_secret(name: str, caplog: pytest.LogCaptureFixture) -> None:
    import xr_ginet.sentinel2.patience
    import xr_ginet.sentinel2.rasters  # noqa: F401

    with caplog.at_level("DEBUG", logger=name):
        logging.getLogger(name).warning("GET %s failed", ADDRESSES[3])
    assert "B05.tif failed" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("href", "path"),
    [
        ("https://a.example/B02.tif?sig=x", "/vsicurl/https://a.example/B02.tif?sig=x"),
        ("s3://bucket/B02.tif", "/vsis3/bucket/B02.tif"),
        ("gs://bucket/B02.tif", "/vsigs/bucket/B02.tif"),
        ("gcs://bucket/B02.tif", "/vsigs/bucket/B02.tif"),
        ("az://container/B02.tif", "/vsiaz/container/B02.tif"),
        ("abfs://container/B02.tif", "/vsiaz/container/B02.tif"),
        ("GCS://bucket/B02.tif", "/vsigs/bucket/B02.tif"),
        ("file:///data/a%20b.tif", "/data/a b.tif"),
        ("/data/B02.tif", "/data/B02.tif"),
        ("data/B02.tif", "data/B02.tif"),
    ],
)
def test_gdal_is_told_addresses_by_its_own_names(href: str, path: str) -> None:
    assert gdal_path(href) == path


@pytest.mark.parametrize("scheme", ["abfss", "wasbs", "gdrive", "hdfs", "memory", "github", "vrt", "foo"])
def test_a_scheme_that_gdal_would_take_for_a_folder_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match=rf"rasters are not read from {scheme}://, but from paths and from http"):
        gdal_path(f"{scheme}://bucket/B02.tif")
    with pytest.raises(ValueError, match=r"names a storage account.*https://acc\.blob\.core\.windows\.net/container/…"):
        gdal_path("abfs://container@acc.dfs.core.windows.net/B02.tif")
