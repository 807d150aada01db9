"""What the trials of all ranks together showed."""

from syncbn.doctor.findings import Finding, World, listed

CLOCK_SKEW = 1.0
"""Seconds; logs of several nodes cannot be compared beyond it, nor ages of files."""

LAYER_TOLERANCE = 1e-3
"""Of outputs of the order of 1 in float32."""

MESSAGES = 66
"""Of Inception-BN's layers in a step, both directions."""

SLOW_LATENCY, SLOW_BANDWIDTH = 5e-3, 100e6
"""Seconds and bytes a second, beyond which messages rather than arithmetic decide the speed of a step."""


def check_run_folder(world: World) -> Finding:
    """Whether all nodes see the folder in which rank 0 writes."""
    blind = [world.hosts[rank] for rank, trials in world.trials.items() if trials.sees_run_folder is False]
    folder = world.facts[0].configuration.runs_folder
    if blind:
        return Finding(
            "run folder",
            "wrong",
            f"{folder}: {listed(sorted(set(blind)))} do not see what rank 0 writes",
            "choose --runs_folder on a file system that all nodes share: all of them read checkpoints",
        )
    if not world.trials or any(trials.sees_run_folder is None for trials in world.trials.values()):
        return Finding("run folder", "warning", "not tried on all ranks", "mend what is wrong first")
    return Finding("run folder", "ok", f"{folder} is seen by all ranks")


def check_clocks(world: World) -> Finding:
    """Whether the clocks of the nodes agree."""
    offsets = [
        (world.hosts[rank], trials.clock_offset, trials.clock_uncertainty or 0.0)
        for rank, trials in world.trials.items()
        if trials.clock_offset is not None
    ]
    if not offsets:
        return Finding("clocks", "warning", "not compared", "mend what is wrong first")
    off = {host: f"{host} {offset:+.3f} s" for host, offset, unsure in offsets if abs(offset) - unsure > CLOCK_SKEW}
    if off:
        seen = f"against rank 0: {listed(list(off.values()))}"
        return Finding("clocks", "warning", seen, "run NTP (chrony) on every node")
    largest = max(abs(offset) for _, offset, _ in offsets)
    unsure = max(unsure for _, _, unsure in offsets)
    return Finding("clocks", "ok", f"within {1e3 * largest:.1f} ms (measured to {1e3 * unsure:.1f} ms)")


def check_collective(world: World) -> Finding:
    """Whether the ranks' process group forms, adds up exactly, and normalises one batch."""
    failed = [
        f"rank {rank} on {world.hosts[rank]}, {trials.stage}: {trials.error}"
        for rank, trials in world.trials.items()
        if trials.error
    ]
    stuck = [
        f"rank {rank} on {world.hosts[rank]} is still {trials.stage or 'before the first trial'}"
        for rank, trials in world.trials.items()
        if not trials.finished and not trials.error
    ]
    if failed or stuck:
        return Finding(
            "messages",
            "wrong",
            listed(failed + stuck, 4),
            "let the nodes reach each other on every port; name the interface between them in GLOO_SOCKET_IFNAME or"
            " NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more",
        )
    untried = [rank for rank, trials in world.trials.items() if trials.sum_is_exact is None]
    if untried or not world.trials:
        return Finding("messages", "warning", "not tried", "mend what is wrong first")
    wrong = [rank for rank, trials in world.trials.items() if not trials.sum_is_exact]
    if wrong:
        return Finding(
            "messages",
            "wrong",
            f"sums in float64 are wrong on ranks {listed(wrong)}",
            "change the backend or its version",
        )
    error = max(trials.layer_error or 0.0 for trials in world.trials.values())
    if not error < LAYER_TOLERANCE:
        return Finding(
            "messages", "wrong", f"a synchronised layer is wrong by {error:.1e}", "report it, with this table"
        )
    return Finding("messages", "ok", f"sums exact in float64, a synchronised layer right to {error:.0e}")


def check_speed(world: World) -> Finding:
    """Whether messages are quick enough for a layer that sends one in each direction."""
    latencies = [trials.latency for trials in world.trials.values() if trials.latency is not None]
    bandwidths = [trials.bandwidth for trials in world.trials.values() if trials.bandwidth is not None]
    if world.world_size == 1 and latencies:
        return Finding("speed", "ok", "one rank sends no messages")
    if not latencies:
        return Finding("speed", "warning", "not measured", "mend what is wrong first")
    latency, bandwidth = max(latencies), min(bandwidths)
    seen = (
        f"a layer's message {1e3 * latency:.2f} ms (a step of Inception-BN sends {MESSAGES}:"
        f" {1e3 * MESSAGES * latency:.0f} ms); {bandwidth / 1e9:.2f} GB/s"
    )
    if latency > SLOW_LATENCY or bandwidth < SLOW_BANDWIDTH:
        remedy = (
            "use the fast network between the nodes (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or normalise within a"
            " node: --model.normalization_batch_size"
        )
        return Finding("speed", "warning", seen, remedy)
    return Finding("speed", "ok", seen)


CHECKS = (check_run_folder, check_clocks, check_collective, check_speed)
