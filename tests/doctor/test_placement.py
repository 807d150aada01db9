"""Where the launchers' variables place a process."""

from syncbn.doctor.launch import placement_by_environment


def test_master_addr_comes_before_the_first_of_slurms_nodes(monkeypatch):
    """Lightning reads r1i0 from this list, which is no node."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    job = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_NODELIST": "r1i[0-1]n[0-3]"}
    for name, value in (job | {"SLURM_STEP_NODELIST": job["SLURM_NODELIST"], "MASTER_ADDR": "r1i0n0"}).items():
        monkeypatch.setenv(name, value)
    placement = placement_by_environment()
    assert placement is not None
    assert (placement.launcher, placement.rank, placement.address) == ("slurm", 5, "r1i0n0")
