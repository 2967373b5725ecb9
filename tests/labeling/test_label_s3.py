"""Labelling from an S3 on this machine: the rows of a run over the same files here."""

from label_command import make_pictures, rows, run_label


def test_pictures_in_a_bucket_give_the_rows_of_files_here(label_model, tmp_path, bucket):
    address, system = bucket
    folder = make_pictures(tmp_path / "photos", 12)
    system.put(f"{folder}/", f"{address}/photos/", recursive=True)
    run_label(label_model, tmp_path / "here", folder)
    status, _, said = run_label(label_model, tmp_path / "there", f"{address}/photos")
    assert status == 0, said

    def renamed(out, root):
        return sorted(
            (row["source"].removeprefix(root), row["boxes"], row["scores"], row["labels"]) for row in rows(out)
        )

    assert renamed(tmp_path / "there", f"{address}/photos") == renamed(tmp_path / "here", str(folder))
