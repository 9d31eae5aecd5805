"""Videos to files, side by side and compared."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from psa_integrations.cli.video import check_output, psnr_and_ssim, side_by_side, write_video


def moving_square(frames: int = 5, size: int = 32) -> np.ndarray:
    video = np.zeros((frames, size, size, 3), dtype=np.float32)
    for i in range(frames):
        video[i, 8:20, 2 * i : 2 * i + 12] = (0.9, 0.4, 0.1)
    return video


def test_a_written_video_reads_back(tmp_path: Path) -> None:
    video = moving_square()
    write_video(video, tmp_path / "a.mp4", fps=5)
    read = iio.imread(tmp_path / "a.mp4").astype(np.float32) / 255
    assert read.shape == video.shape
    # The codec halves the resolution of colour, so only the mean is close.
    assert np.abs(read - video).mean() < 0.05
    assert iio.immeta(tmp_path / "a.mp4")["fps"] == 5


def test_an_existing_video_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")
    write_video(moving_square(), tmp_path / "a.mp4", fps=5)
    assert len(iio.imread(tmp_path / "a.mp4")) == 5


def test_a_link_stays_and_leads_to_the_video(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    target, link = tmp_path / "videos" / "fox.mp4", tmp_path / "newest.mp4"
    link.symlink_to(target)
    for _ in range(2):  # a new file, then one in place of another
        check_output(link)
        write_video(moving_square(), link, fps=5)
        assert link.is_symlink()
        assert len(iio.imread(target)) == 5
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["fox.mp4", "newest.mp4", "videos"]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "fox.mp4")
    with pytest.raises(FileNotFoundError, match=r"--out must lie in a folder that exists, got .*nowhere"):
        check_output(link)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"--out must be a file, and .*b\.mp4 is a folder"):
        check_output(tmp_path / "b.mp4")
    with pytest.raises(FileNotFoundError, match="--out must lie in a folder that exists"):
        check_output(tmp_path / "none" / "a.mp4")
    # Nobody can make a file there, whatever the permission bits say.
    with pytest.raises(OSError, match=r"--out must lie in a folder that can be written, got /proc/a\.mp4"):
        check_output(Path("/proc/a.mp4"))


def test_side_by_side_keeps_every_pixel() -> None:
    left, right = moving_square(), 1 - moving_square()
    joined = side_by_side([left, right], scale=3)
    assert joined.shape == (5, 96, (32 + 2 + 32) * 3, 3)
    assert np.array_equal(joined[:, ::3, : 32 * 3 : 3], left)
    assert np.array_equal(joined[:, 2::3, 34 * 3 + 2 :: 3], right)
    assert (joined[:, :, 96:102] == 1).all()


def test_equal_videos_are_infinitely_close() -> None:
    psnr, ssim = psnr_and_ssim(moving_square(), moving_square())
    assert psnr == float("inf")
    assert ssim == pytest.approx(1.0)


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    video = np.full((3, 16, 16, 3), 0.5, dtype=np.float32)
    psnr, _ = psnr_and_ssim(video + np.float32(0.1), video)
    assert psnr == pytest.approx(20.0, abs=1e-4)


def test_noise_lowers_ssim() -> None:
    video = moving_square()
    noise = np.random.default_rng(0).normal(0, 0.1, video.shape).astype(np.float32)
    assert psnr_and_ssim(video + noise, video)[1] < 0.9
