"""SAFE products: a tree in ESA's layout, with ESA's names and metadata, becomes the cube that it holds."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from conftest import no_compute, random_checkpoint
from numpy.testing import assert_array_equal

import xr_ginet
from xr_ginet.sentinel2.bands import BANDS, BANDS_10M, BANDS_20M
from xr_ginet.sentinel2.provenance import of_all
from xr_ginet.sentinel2.safe import Product, _start_time, read_radiometry

OF_LEVEL = {"2A": "S2B_MSIL2A_20240830T100559_N0511_R022_T32TPS_20240830T134009"}
OF_LEVEL["1C"] = "S2B_MSIL1C_20240830T100559_N0511_R022_T32TPS_20240830T121015"
OFFSETS = {
    name: -1000 - i for i, name in enumerate(("B01", *"B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12".split()))
}
"""By band, in the order of band_id; all different, so that a mistaken id shows."""
SIZES = {10: (36, 48), 20: (18, 24), 60: (6, 8)}


def metadata(level: str, *, baseline: str = "05.11", offsets: dict[str, int] | None = None, start: bool = True) -> str:
    boa = level == "2A"
    tag, listing = (
        ("BOA_ADD_OFFSET", "BOA_ADD_OFFSET_VALUES_LIST") if boa else ("RADIO_ADD_OFFSET", "Radiometric_Offset_List")
    )
    ids = list(OFFSETS)
    lines = "".join(f'<{tag} band_id="{ids.index(name)}">{value}</{tag}>' for name, value in (offsets or {}).items())
    scale = (
        '<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>'
        '<AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>'
        if boa
        else '<QUANTIFICATION_VALUE unit="none">10000</QUANTIFICATION_VALUE>'
    )
    time = "<PRODUCT_START_TIME>2024-08-30T10:05:59.024Z</PRODUCT_START_TIME>" if start else ""
    schema = f"https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-{level}.xsd"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><n1:Level-{level}_User_Product xmlns:n1="{schema}"><n1:General_Info>'
        f"<Product_Info>{time}<PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE></Product_Info>"
        f"<Product_Image_Characteristics>{scale}{f'<{listing}>{lines}</{listing}>' if offsets else ''}"
        f"</Product_Image_Characteristics></n1:General_Info></n1:Level-{level}_User_Product>"
    )


def write_jp2(path: Path, image: np.ndarray, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES", "count": 1, "dtype": image.dtype}
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(600_000, 5_100_000, size, size)}
    with rasterio.open(path, "w", height=image.shape[0], width=image.shape[1], **profile, **place) as file:
        file.write(image, 1)


def write_safe(folder: Path, level: str, numbers: dict[str, np.ndarray], xml: str) -> Path:
    """Write a product; L2A has the coarser copies of finer bands too, L1C each band at its own resolution only."""
    root = folder / f"{OF_LEVEL[level]}.SAFE"
    granule = root / "GRANULE" / f"L{level}_T32TPS_A038765_20240830T100558"
    for name, image in numbers.items():
        native = 20 if name == "SCL" else BANDS[name].resolution
        if level == "1C":
            write_jp2(granule / "IMG_DATA" / f"T32TPS_20240830T100559_{name}.jp2", image, native)
            continue
        for size in (s for s in (10, 20, 60) if s >= native):
            copy = image if size == native else np.full(SIZES[size], 7, image.dtype)
            write_jp2(granule / "IMG_DATA" / f"R{size}m" / f"T32TPS_20240830T100559_{name}_{size}m.jp2", copy, size)
    write_jp2(granule / "QI_DATA" / "MSK_DETFOO_B02.jp2", np.ones((36, 48), "uint8"), 10)
    (root / f"MTD_MSIL{level}.xml").write_text(xml)
    (granule / "MTD_TL.xml").write_text("<tile/>")
    return root


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    images = {
        n: rng.integers(1020, 6000, SIZES[BANDS[n].resolution]).astype("uint16") for n in (*BANDS_10M, *BANDS_20M)
    }
    images["B02"][0, 1] = images["B05"][3, 4] = 0
    return images


def expected_cube(numbers: dict[str, np.ndarray], offsets: dict[str, int]) -> xr.Dataset:
    parts = []
    for names, size in ((BANDS_10M, 10), (BANDS_20M, 20)):
        height, width = SIZES[size]
        coords = {"y": 5_100_000 - size * (np.arange(height) + 0.5), "x": 600_000 + size * (np.arange(width) + 0.5)}
        bands = {}
        for name in names:
            reflectance = (numbers[name].astype("float32") + np.float32(offsets[name])) * np.float32(1e-4)
            bands[name] = (("y", "x"), np.where(numbers[name] == 0, np.float32(np.nan), reflectance))
        parts.append(xr.Dataset(bands, coords))
    return xr_ginet.pair(*parts).expand_dims(time=[np.datetime64("2024-08-30T10:05:59.024", "ns")])


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("level", ["1C", "2A"])
def test_a_product_becomes_the_cube_that_it_holds(
    level: str, zipped: bool, numbers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    images = numbers | ({"SCL": np.arange(18 * 24, dtype="uint8").reshape(18, 24) % 12} if level == "2A" else {})
    path = write_safe(tmp_path, level, images, metadata(level, offsets=OFFSETS))
    if zipped:
        archive = tmp_path / f"{path.stem}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for entry in sorted(path.rglob("*")):
                file.write(entry, entry.relative_to(tmp_path))
        path = archive
    with no_compute():
        cube = xr_ginet.open_safe(path, chunks=16)
    expected = expected_cube(numbers, OFFSETS)
    assert cube["B02"].chunks == ((1,), (16, 16, 4), (16, 16, 16))
    assert cube["B05"].chunks == ((1,), (8, 8, 2), (8, 8, 8))
    for name in (*BANDS_10M, *BANDS_20M):
        assert cube[name].dtype == np.float32
        assert cube[name].dims == expected[name].dims
        assert_array_equal(cube[name].values, expected[name].values)
        assert cube[name].attrs == expected[name].attrs
    for coordinate in ("time", "y", "x", "y_20m", "x_20m"):
        assert_array_equal(cube[coordinate], expected[coordinate])
    assert cube.rio.crs.to_epsg() == 32632
    assert of_all(cube)["source_items"] == [OF_LEVEL[level]]
    assert "offset -1001 as the product's metadata states" in of_all(cube)["radiometry"]
    assert ("SCL" in cube) == (level == "2A")
    if level == "2A":
        assert cube["SCL"].dims == ("time", "y_20m", "x_20m")
        assert_array_equal(cube["SCL"].values[0], images["SCL"])


def test_a_product_is_superresolved_as_its_two_grids_and_written(
    numbers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    images = numbers | {"SCL": np.full((18, 24), 4, "uint8")}
    path = write_safe(tmp_path, "2A", images, metadata("2A", offsets=OFFSETS))
    checkpoint = random_checkpoint(tmp_path / "s.safetensors", n_features=4, n_stages=1)
    cube = xr_ginet.open_safe(path / "MTD_MSIL2A.xml", chunks=16)
    found = cube.ginet.superresolve(weights=checkpoint)
    expected = expected_cube(numbers, OFFSETS).chunk({"y": 16, "x": 16, "y_20m": 8, "x_20m": 8})
    result = expected.ginet.superresolve(weights=checkpoint)
    for name in (*BANDS_10M, *BANDS_20M):
        assert_array_equal(found[name].values, result[name].values)
    assert of_all(found)["source_items"] == [OF_LEVEL["2A"]]
    cube.ginet.to_zarr(tmp_path / "cube.zarr")
    with xr.open_zarr(tmp_path / "cube.zarr", chunks=None) as stored:
        assert stored["SCL"].dtype == np.uint8
        assert_array_equal(stored["B8A"], cube["B8A"])


def test_offsets_are_none_before_baseline_4_and_the_callers_where_given(
    numbers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = write_safe(tmp_path, "1C", numbers, metadata("1C", baseline="02.14"))
    cube = xr_ginet.open_safe(path)
    assert cube["B03"].values[0] == pytest.approx(numbers["B03"] * np.float32(1e-4))
    assert of_all(cube)["radiometry"] == "offset 0: none stated, processing baseline 02.14"
    cube = xr_ginet.open_safe(path, offset=-1000)
    assert cube["B03"].values[0] == pytest.approx((numbers["B03"].astype("f4") - 1000) * np.float32(1e-4))
    assert of_all(cube)["radiometry"] == "offset -1000 given by the caller"


def test_products_of_before_december_2016_are_found_by_their_names(tmp_path: Path) -> None:
    product = tmp_path / "S2A_OPER_PRD_MSIL1C_PDMC_20160905T104813_R002_V20160905T005712_20160905T010424.SAFE"
    granule = product / "GRANULE" / "S2A_OPER_MSI_L1C_TL_SGS__20160905T073438_A006291_T53HLA_N02.04"
    image = granule / "IMG_DATA" / "S2A_OPER_MSI_L1C_TL_SGS__20160905T073438_A006291_T53HLA_B8A.jp2"
    image.parent.mkdir(parents=True)
    image.touch()
    (granule / "S2A_OPER_MTD_L1C_TL_SGS__20160905T073438_A006291_T53HLA.xml").write_text("<tile/>")
    (product / "S2A_OPER_MTD_SAFL1C_PDMC_20160905T104813_R002_V20160905T005712_20160905T010424.xml").write_text(
        metadata("1C", baseline="02.04")
    )
    found = Product.find(product)
    assert found.name == product.stem
    assert found.image("B8A", 20) == str(image)
    assert read_radiometry(found, ["B8A"])["B8A"].offset == 0


def test_products_that_cannot_be_read_are_refused(numbers: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = write_safe(tmp_path, "2A", numbers, metadata("2A", offsets=OFFSETS))
    xml = path / "MTD_MSIL2A.xml"
    with pytest.raises(FileNotFoundError, match="no product at /"):
        xr_ginet.open_safe(tmp_path / "elsewhere")
    (tmp_path / "MTD_TL.txt").write_text("x")
    with pytest.raises(ValueError, match=r"MTD_TL.txt is neither a folder nor a zip: pass the .SAFE folder"):
        xr_ginet.open_safe(tmp_path / "MTD_TL.txt")
    with pytest.raises(ValueError, match="holds 0 files of product metadata"):
        xr_ginet.open_safe(path / "GRANULE")
    with pytest.raises(ValueError, match="chunks=7: must be an even number"):
        xr_ginet.open_safe(path, chunks=7)
    with pytest.raises(ValueError, match="bands holds B09: must be among B02"):
        xr_ginet.open_safe(path, bands=("B02", "B09"))
    for text, match in (
        (metadata("2A", baseline="05.11"), r"states no offset for B02, .*, and its processing baseline is 05.11. Type"),
        (metadata("2A", baseline="unknown"), r"states no offset for B02, .*, and its processing baseline is unknown"),
        (metadata("2A", offsets={n: v for n, v in OFFSETS.items() if n != "B8A"}), "states no offset for B8A, and"),
        (metadata("2A", offsets=OFFSETS).replace("QUANTIFICATION_VALUE", "VALUE"), "no QUANTIFICATION_VALUE in its"),
        (metadata("2A", offsets=OFFSETS, start=False), "no PRODUCT_START_TIME in its metadata"),
    ):
        xml.write_text(text)
        with pytest.raises(ValueError, match=match):
            xr_ginet.open_safe(path)
    xml.write_text(metadata("2A", offsets=OFFSETS))
    images = next(path.glob("GRANULE/*")) / "IMG_DATA"
    band = next(images.glob("R20m/*_B11_20m.jp2"))
    other = path / "GRANULE" / "L2A_T32TQS_A038765_20240830T100558" / "IMG_DATA" / "R20m"
    other.mkdir(parents=True)
    (other / "T32TQS_20240830T100559_B11_20m.jp2").write_bytes(band.read_bytes())
    with pytest.raises(ValueError, match="holds B11 of 2 tiles: only products of one tile"):
        xr_ginet.open_safe(path)
    band.unlink()
    (other / "T32TQS_20240830T100559_B11_20m.jp2").unlink()
    with pytest.raises(
        ValueError, match=r"has no B11 at 20 m under GRANULE/\*/IMG_DATA; it has B02, B03, .*get it again"
    ):
        xr_ginet.open_safe(path)
    (tmp_path / "second.SAFE").mkdir()
    (tmp_path / "second.SAFE" / "MTD_MSIL1C.xml").write_text(metadata("1C"))
    with pytest.raises(ValueError, match=r"holds 2 files of product metadata .*MTD_MSIL1C.xml"):
        xr_ginet.open_safe(tmp_path)


# -- damaged and hostile products
# ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def product(numbers: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safe(tmp_path_factory.mktemp("safe"), "2A", numbers, metadata("2A", offsets=OFFSETS))


def zipped(product: Path, path: Path, changed: dict[str, bytes] | None = None) -> Path:
    """Write a product as a zip, with the content of some files replaced."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in sorted(entry for entry in product.rglob("*") if entry.is_file()):
            name = entry.relative_to(product.parent).as_posix()
            new = next((content for end, content in (changed or {}).items() if name.endswith(end)), None)
            archive.writestr(name, entry.read_bytes() if new is None else new)
    return path


XML = metadata("2A", offsets=OFFSETS)
BOMB = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "lol"}">' for i in range(10))


@pytest.mark.parametrize(
    ("xml", "match"),
    [
        ("", r"MTD_MSIL2A.xml cannot be read as XML: ParseError: no element found.*get it again"),
        (XML[: len(XML) // 2], r"MTD_MSIL2A.xml cannot be read as XML: ParseError: "),
        ("\x00" * 50, r"MTD_MSIL2A.xml cannot be read as XML"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', r"MTD_MSIL2A.xml cannot be read as XML"),
        (f"<!DOCTYPE a [{BOMB}]><a>&a9;</a>", r"MTD_MSIL2A.xml cannot be read as XML: .*declares a DOCTYPE"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>', r"declares a DOCTYPE"),
        (XML + " " * 2**24, r"MTD_MSIL2A.xml cannot be read: it has 16 MiB, far more than metadata has"),
        (
            XML.replace("2024-08-30T10:05:59.024Z", "yesterday"),
            r"states PRODUCT_START_TIME 'yesterday'; a time such as",
        ),
        (XML.replace("2024-08-30T10:05:59.024Z", "NaT"), r"states PRODUCT_START_TIME 'NaT'"),
        (XML.replace("2024-08-30", "9999-08-30"), r"states PRODUCT_START_TIME '9999"),
        *(
            (XML.replace(">10000<", f">{text}<"), rf"states QUANTIFICATION_VALUE '{text}'; a number from 100 to 1e\+06")
            for text in ("0", "nan", "inf", "-10000", "1e308", "1e-300", "ten", "1")
        ),
        *(
            (XML.replace('band_id="1"', f'band_id="{text}"'), rf"offset for band_id '{text}'; from 0 to 12 is expected")
            for text in ("99", "-12", "", "x", "13", "٣")
        ),
        (XML.replace(' band_id="1"', ""), r"offset for band_id ''; from 0 to 12"),
        (XML.replace(">-1001<", ">nan<"), r"states BOA_ADD_OFFSET 'nan'; a number from -100000 to 100000"),
    ],
)
def test_metadata_that_is_damaged_is_named(xml: str, match: str, product: Path, tmp_path: Path) -> None:
    (tmp_path / "a.SAFE").mkdir()
    (tmp_path / "a.SAFE" / "MTD_MSIL2A.xml").write_text(xml)
    for path in (tmp_path / "a.SAFE", zipped(product, tmp_path / "a.zip", {"MTD_MSIL2A.xml": xml.encode()})):
        with pytest.raises(ValueError, match=match):
            read_radiometry(found := Product.find(path), ["B02"]), _start_time(found)


def test_a_zip_that_is_cut_or_damaged_is_named(product: Path, tmp_path: Path) -> None:
    whole = zipped(product, tmp_path / "a.zip").read_bytes()
    rng = np.random.default_rng(1)
    for length in (0, 1, len(whole) // 3, len(whole) - 30):
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.zip is neither a folder nor a zip.*cut or damaged.*get it again"):
            xr_ginet.open_safe(tmp_path / "cut.zip")
    at = whole.index(b"PK\x01\x02")  # the directory at the end
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(at, len(whole), 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "damaged.zip").write_bytes(bytes(damaged))
        named = ""
        try:
            cube = xr_ginet.open_safe(tmp_path / "damaged.zip", chunks=16, bands=("B02", "B05"))
            cube.compute(scheduler="synchronous")
        except (ValueError, RuntimeError) as error:
            named = str(error)
        assert not named or "damaged.zip" in named or OF_LEVEL["2A"] in named


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.95])
def test_an_image_that_is_cut_is_an_error_and_never_missing_pixels(kept: float, product: Path, tmp_path: Path) -> None:
    image = next(product.rglob("*_B02_10m.jp2")).read_bytes()
    path = zipped(product, tmp_path / "a.zip", {"_B02_10m.jp2": image[: int(kept * len(image))]})
    with pytest.raises(
        (ValueError, RuntimeError), match=r"_B02_10m.jp2 cannot be (opened|read): .*get the product again"
    ):
        xr_ginet.open_safe(path, bands=("B02", "B05")).compute(scheduler="synchronous")


@pytest.mark.parametrize(
    ("profile", "match"),
    [
        ({"crs": None}, "has no CRS with an EPSG code"),
        ({"crs": "EPSG:32633"}, r"has .* in EPSG:32633; .*_B02_10m.jp2 has"),
        ({"size": 20}, "holds uint16 in pixels of 20 by 20; uint16 in pixels of 10 m is expected"),
        ({"origin": 600_100}, r"has \(36, 48\) pixels from 600100"),
        ({"dtype": "int16"}, "holds int16 in pixels of 10 by 10; uint16"),
        ({"shape": (36, 40)}, r"has \(36, 40\) pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_an_image_that_is_not_what_its_name_says_is_named(
    profile: dict, match: str, product: Path, tmp_path: Path
) -> None:
    said = {"crs": "EPSG:32632", "size": 10, "origin": 600_000, "dtype": "uint16", "shape": (36, 48)} | profile
    place = rasterio.transform.from_origin(said["origin"], 5_100_000, said["size"], said["size"])
    height, width = said["shape"]
    options = {"crs": said["crs"], "transform": place, "QUALITY": 100, "REVERSIBLE": "YES"}
    with rasterio.open(
        tmp_path / "x.jp2", "w", "JP2OpenJPEG", width, height, 1, dtype=said["dtype"], **options
    ) as file:
        file.write(np.ones((height, width), said["dtype"]), 1)
    path = zipped(product, tmp_path / "a.zip", {"_B03_10m.jp2": (tmp_path / "x.jp2").read_bytes()})
    with pytest.raises(ValueError, match=rf"_B03_10m.jp2 {match}"):
        xr_ginet.open_safe(path, bands=("B02", "B03", "B05"))


@pytest.mark.parametrize("beside", [False, True])
def test_an_image_of_a_product_that_names_other_files_is_not_opened(
    beside: bool, product: Path, numbers: dict[str, np.ndarray], tmp_path: Path
) -> None:
    private = tmp_path / "private.jp2"
    write_jp2(private, np.full((36, 48), 4242, "uint16"), 10)
    vrt = (
        '<VRTDataset rasterXSize="48" rasterYSize="36"><SRS>EPSG:32632</SRS><GeoTransform>600000,10,0,5100000,0,-10'
        '</GeoTransform><VRTRasterBand dataType="UInt16" band="1"><SimpleSource><SourceFilename>'
        f"{private}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    ).encode()
    if beside:
        path = zipped(product, tmp_path / "a.zip")
        with zipfile.ZipFile(path, "a") as archive:
            name = next(name for name in archive.namelist() if name.endswith("_B02_10m.jp2"))
            for suffix in (".msk", ".ovr", ".aux.xml"):
                archive.writestr(name + suffix, vrt)
        cube = xr_ginet.open_safe(path, bands=("B02", "B05"))
        expected = expected_cube(numbers, OFFSETS)["B02"].values
        assert_array_equal(cube["B02"].values, expected)
        return
    path = zipped(product, tmp_path / "a.zip", {"_B02_10m.jp2": vrt})
    with pytest.raises(ValueError, match=r"_B02_10m.jp2 cannot be opened: .*not recognized"):
        xr_ginet.open_safe(path, bands=("B02", "B05"))
