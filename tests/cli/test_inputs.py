"""What the user typed: images out of files, folders, globs and addresses, labels out of text and files."""

import pytest
from PIL import Image

from gdino_hf.cli.errors import UsageError
from gdino_hf.cli.inputs import ImageInput, collect_images, read_labels
from picture_bytes import encoded, smooth


@pytest.fixture
def folder(tmp_path):
    """photos/a.jpg, photos/B.PNG, photos/deep/a.jpg, and what is no picture or hidden."""
    root = tmp_path / "photos"
    for name in ("a.jpg", "B.PNG", "deep/a.jpg", ".hidden.jpg", ".cache/thumb.jpg", "notes.txt", "folder.jpg/x.txt"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    return root


def sources(images):
    return [image.source for image in images]


def test_a_folder_yields_its_pictures_and_those_below_it(folder):
    images = collect_images([str(folder)])
    assert [image.name for image in images] == ["B.PNG", "a.jpg", "deep/a.jpg"]
    assert sources(images) == [str(folder / image.name) for image in images]
    assert all(image.error is None for image in images)


@pytest.fixture
def mixed(tmp_path):
    """A folder as people have them: pictures under many names, other kinds of pictures, other files."""
    root = tmp_path / "mixed"
    (root / "deep").mkdir(parents=True)
    image = Image.fromarray(smooth())
    for name, kind in {
        "a.jpe": "JPEG",
        "b.jp2": "JPEG2000",
        "c.ppm": "PPM",
        "d": "PNG",
        "e.dat": "WEBP",
        "f.tga": "TGA",
        "deep/g.JFIF": "JPEG",
    }.items():
        (root / name).write_bytes(encoded(image, kind))
    (root / "h.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    (root / "i.avif").write_bytes(b"damaged")
    (root / "j.svg").write_bytes(b"<svg/>")
    (root / "k.cr2").write_bytes(b"II*\0\x10\0\0\0CR" + bytes(40))
    (root / "l.bin").write_bytes(b"8BPS\0\1" + bytes(40))
    for name in ("notes.txt", "deep/labels.csv", "clip.mp4", "empty"):
        (root / name).write_bytes(b"")
    (root / ".DS_Store").write_bytes(b"")
    return root


def test_every_picture_of_a_folder_is_taken_by_its_content(mixed):
    left_out = []
    images = collect_images([str(mixed)], left_out=left_out)
    assert [image.name for image in images if image.error is None] == [
        *("a.jpe", "b.jp2", "c.ppm", "d", "deep/g.JFIF", "e.dat", "f.tga", "h.heic", "i.avif"),
    ]
    assert left_out == [f"{mixed}: 5 files left out: 4 are not pictures and 1 is hidden"]


def test_pictures_of_kinds_that_are_not_read_are_named(mixed):
    named = {image.name: image.error for image in collect_images([str(mixed)]) if image.error}
    assert list(named) == ["j.svg", "k.cr2", "l.bin"]
    for kind, error in zip(("an SVG drawing", "of the kind .cr2", "a Photoshop document"), named.values(), strict=True):
        assert kind in error
        assert "save it as JPEG" in error


def test_one_file_left_out_is_said_in_the_singular(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    left_out = []
    collect_images([str(tmp_path), str(tmp_path)], left_out=left_out)
    assert left_out == [f"{tmp_path}: 1 file left out: 1 is not a picture"]


def test_results_inside_the_folder_are_not_looked_at_again(folder):
    assert sources(collect_images([str(folder)], exclude=folder / "deep")) == [
        str(folder / "B.PNG"),
        str(folder / "a.jpg"),
    ]


def test_a_folder_of_results_that_is_itself_the_input_is_looked_at(folder):
    assert len(collect_images([str(folder)], exclude=folder)) == 3


def test_a_glob_yields_matches_sorted_and_stars_reach_folders_below(folder):
    assert sources(collect_images([str(folder / "*.jpg")]))[0] == str(folder / "a.jpg")
    assert str(folder / "deep" / "a.jpg") in sources(collect_images([str(folder / "**" / "*.jpg")]))


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    for name in ("img[1].jpg", "img1.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert sources(collect_images([str(tmp_path / "img[1].jpg")])) == [str(tmp_path / "img[1].jpg")]


def test_an_image_named_twice_is_one_image(folder):
    assert len(collect_images([str(folder / "a.jpg"), str(folder), str(folder / "*.jpg")])) == 3


def test_a_file_spelt_in_two_ways_is_one_image(folder, monkeypatch):
    monkeypatch.chdir(folder)
    spellings = ["a.jpg", str(folder / "a.jpg"), "./a.jpg", "deep/../a.jpg", "*.jpg"]
    assert sources(collect_images(spellings)) == ["a.jpg"]


def test_a_link_that_leads_nowhere_is_named_wherever_it_lies(folder):
    link = folder / "deep" / "gone.jpg"
    link.symlink_to("no-such-file.jpg")
    for argument in (folder, folder / "deep" / "*.jpg", link):
        (gone,) = [image for image in collect_images([str(argument)]) if image.source == str(link)]
        assert "leads nowhere (no-such-file.jpg)" in gone.error
        assert all(
            image.error is None for image in collect_images([str(argument)]) if image is not gone and image != gone
        )


def test_order_is_the_one_given(folder):
    given = [str(folder / "deep" / "a.jpg"), str(folder / "a.jpg")]
    assert sources(collect_images(given)) == given


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("no/such.jpg", "there is no such file"),
        ("no/*.jpg", "nothing matches"),
        ("x" * 10_000, "this path cannot be read"),
        ("~nobody-of-this-name/x.jpg", "this path cannot be read"),
    ],
)
def test_an_argument_without_images_says_why(argument, reason):
    (image,) = collect_images([argument])
    assert image.source == argument
    assert reason in image.error


def test_a_folder_without_pictures_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (image,) = collect_images([str(tmp_path)])
    assert "no images" in image.error


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://host/photos/red%20car.jpg?size=2", "red car.jpg"),
        ("HTTPS://HOST/Photo.JPG", "Photo.JPG"),
        ("https://host/", "image"),
        ("https://host", "image"),
        ("http://host/a/..", "image"),
        ("http://host/..%5C..%5Cx.jpg", "_.._x.jpg"),
        ("http://[broken/x.jpg", "image"),
        ("http://host/" + "y" * 500 + ".png", "y" * 96 + ".png"),
    ],
)
def test_an_address_is_filed_under_a_harmless_name(address, name):
    assert collect_images([address]) == [ImageInput(address, name)]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("cat, remote control", ["cat", "remote control"]),
        (" cat ,, dog,", ["cat", "dog"]),
        ("cat, dog, cat", ["cat", "dog"]),
        ("a cat. a remote control.", ["a cat", "a remote control"]),
        ("St. Bernard", ["St. Bernard"]),
        ("a cat. a dog", ["a cat", "a dog"]),
        ("St. Bernard, cat.", ["St. Bernard", "cat"]),
        ("кошка, 猫, 🐈", ["кошка", "猫", "🐈"]),
    ],
)
def test_labels_are_parted_by_commas_or_closed_by_periods(text, labels):
    assert read_labels(text) == labels


def test_labels_from_a_file_stand_one_per_line(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("\ufeffcat\n\nsalt, pepper\r\n  dog\n", encoding="utf-8")
    assert read_labels(f"@{file}") == ["cat", "salt, pepper", "dog"]


@pytest.mark.parametrize("text", ["", " ", ",", " , ,", "."])
def test_no_label_is_a_usage_error(text):
    with pytest.raises(UsageError, match=r"--negative .* holds no label"):
        read_labels(text, "--negative")


@pytest.mark.parametrize("text", ["\udcff", "cat, d\udcffg"])
def test_bytes_that_are_no_text_are_a_usage_error(text):
    with pytest.raises(UsageError, match=r"--labels: the label '.*\\udcff.*' holds bytes that are not UTF-8"):
        read_labels(text)


def test_a_label_file_that_cannot_be_read_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_labels(f"@{tmp_path / 'absent.txt'}")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        read_labels(f"@{tmp_path / 'latin.txt'}")
