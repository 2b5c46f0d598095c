"""A Slurm job's nodes and ranks, and srun's command line: what is read and written, exactly."""

from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lb.errors import UserError
from hvd_lb.launch.rank.slurm import rank_environment
from hvd_lb.launch.starters import allocation as slurm
from hvd_lb.launch.starters.allocation import (
    Allocation,
    PyxisContainer,
    allocation,
    expand_counts,
    gpus_of_nodes,
    one_per_node,
    srun_command,
)

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")


def compressed(counts: list[int]) -> str:
    """As Slurm writes numbers per node."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ",".join(str(count) + (f"(x{times})" if times > 1 else "") for count, times in runs)


def test_counts_per_node() -> None:
    assert expand_counts("8") == [8]
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("72,1(x2),8") == [72, 1, 1, 8]
    for bad in ("", "2(3)", "2x3", "2,", "-1", "2(x3)(x2)"):
        with pytest.raises(ValueError, match="such as"):
            expand_counts(bad)


@given(st.lists(st.integers(1, 128), min_size=1, max_size=40))
def test_counts_are_read_as_slurm_writes_them(counts: list[int]) -> None:
    assert expand_counts(compressed(counts)) == counts


@pytest.fixture
def scontrol(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `scontrol` says, by its first two words."""
    said = {
        "show hostnames": "h1\nh2\n",
        "show job": "JobId=7 NodeList=h[1-2] Nodes=h[1-2] CPU_IDs=0 Mem=0 GRES=",
    }
    monkeypatch.setattr(slurm, "_scontrol", lambda *words: said[" ".join(words[:2])])
    return said


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "h[1-2]", "SLURM_JOB_CPUS_PER_NODE": "96(x2)"}


def test_a_slot_is_a_gpu_or_a_task_or_a_core(scontrol: dict[str, str]) -> None:
    assert allocation("auto", JOB) == Allocation([("h1", 96), ("h2", 96)], 0)
    job = {**JOB, "SLURM_TASKS_PER_NODE": "3,2"}
    for device in ("auto", "cuda", "cpu"):
        assert allocation(device, job) == Allocation([("h1", 3), ("h2", 2)], 0)  # type: ignore[arg-type]
    # On a login node nothing but this tells of them; the batch script knows those of its own node.
    scontrol["show job"] = scontrol["show job"].replace("GRES=", "GRES=gpu:8(IDX:0-7)")
    for device in ("auto", "cuda"):
        assert allocation(device, job) == Allocation([("h1", 8), ("h2", 8)], 8)  # type: ignore[arg-type]
    assert allocation("cpu", job) == Allocation([("h1", 3), ("h2", 2)], 0)


def test_a_node_that_slurm_has_taken_out_is_left_out(scontrol: dict[str, str]) -> None:
    scontrol["show job"] = "JobId=7 NodeList=h2 Nodes=h2 CPU_IDs=0 Mem=0 GRES="
    assert allocation("cpu", {**JOB, "SLURM_TASKS_PER_NODE": "3,2"}) == Allocation([("h2", 2)], 0)


def test_of_an_array_the_task_with_the_arrays_number_reads_its_own_line(scontrol: dict[str, str]) -> None:
    """For that number scontrol shows all tasks of the array."""
    other = "JobId=8 ArrayJobId=7 ArrayTaskId=1 NodeList=h9 Nodes=h9 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)"
    scontrol["show job"] = f"{other}\n{scontrol['show job'].replace('JobId=7', 'JobId=7 ArrayJobId=7')}\n"
    assert allocation("cuda", {**JOB, "SLURM_TASKS_PER_NODE": "2(x2)"}) == Allocation(
        [("h1", 2), ("h2", 2)], 0
    )


def test_nodes_with_different_numbers_of_gpus_are_refused_in_slurms_words(scontrol: dict[str, str]) -> None:
    scontrol["show job"] = (
        "Nodes=h1 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1) Nodes=h2 CPU_IDs=0 Mem=0 GRES=gpu:1(IDX:0)"
    )
    with pytest.raises(UserError, match="7 has 2 on h1, 1 on h2.*--gpus-per-node") as error:
        allocation("cuda", {**JOB, "SLURM_TASKS_PER_NODE": "1(x2)"})
    assert "--hosts" not in str(error.value)


def test_a_controller_that_says_nothing_of_a_node_is_not_taken_for_no_gpus(scontrol: dict[str, str]) -> None:
    scontrol["show job"] = "JobId=7 Nodes=h1 CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)"
    with pytest.raises(UserError, match="not whole.*h2"):
        allocation("cuda", {**JOB, "SLURM_TASKS_PER_NODE": "1(x2)"})


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ("", 0),
        ("gpu:2(IDX:0-1)", 2),
        ("gpu:h100:2(IDX:0,3)", 2),
        ("gpu:a100_3g.20gb:1(IDX:0),gpu:h100:2(IDX:2,4)", 3),
        ("license:1(IDX:0),gpu(CNT:4)", 4),
        ("gpu:h100(CNT:4),mps:100(IDX:0-1)", 4),
        ("fpgagpu:2(IDX:0-1)", 0),
    ],
)
def test_gpus_are_counted_as_the_controller_lists_them(resources: str, gpus: int) -> None:
    details = f"JobId=7 BatchHost=h1 NumNodes=2 Nodes=h1,h2 CPU_IDs=0-1 Mem=0 GRES={resources} MinCPUsNode=1"
    assert gpus_of_nodes(details) == {"h1": gpus, "h2": gpus}


def test_a_step_of_one_task_has_its_node_alone(scontrol: dict[str, str]) -> None:
    step = {**JOB, "SLURM_TASKS_PER_NODE": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURMD_NODENAME": "h2"}
    scontrol["show job"] = scontrol["show job"].replace("GRES=", "GRES=gpu:8(IDX:0-7)")
    assert allocation("cpu", {**step, "SLURM_STEP_ID": "0"}) == Allocation([("h2", 1)], 0)
    assert allocation("cuda", {**step, "SLURM_STEP_ID": "0"}) == Allocation([("h2", 8)], 8)
    # salloc's own shell on the first node is for the whole job
    shell = {**step, "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_ID": "4294967290"}
    assert allocation("cpu", shell) == Allocation([("h1", 1), ("h2", 1)], 0)


def test_a_heterogeneous_job_is_refused(scontrol: dict[str, str]) -> None:
    with pytest.raises(UserError, match="heterogeneous Slurm job of 2 components.*one component"):
        allocation("cpu", {**JOB, "SLURM_HET_SIZE": "2"})
    # Under salloc each component has a list of its own, and there is none of all.
    with pytest.raises(UserError, match="heterogeneous Slurm job of 2 components"):
        allocation("cpu", {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "h1"})


def test_outside_of_a_job_there_is_no_allocation() -> None:
    assert allocation("auto", {}) is None


def test_one_task_of_several_is_told_so() -> None:
    with pytest.raises(UserError, match="one of 16 tasks that srun started.*without srun"):
        allocation("auto", {"SLURM_JOB_NODELIST": "h[1-2]", "SLURM_STEP_NUM_TASKS": "16"})


@pytest.mark.parametrize("left", [{}, {"SLURM_TASKS_PER_NODE": "1(x2)"}, {"SLURM_TASKS_PER_NODE": "many"}])
def test_variables_that_are_not_whole_are_told_in_one_line(
    left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_lb.launch.starters.allocation.expand_nodes", lambda nodes: [nodes])
    for tasks in ("1", "x"):
        with pytest.raises(UserError, match="not whole.*--launcher local"):
            allocation("cpu", {"SLURM_JOB_NODELIST": "h1", "SLURM_STEP_NUM_TASKS": tasks, **left})


def test_without_scontrol_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no scontrol on PATH.*not in a container"):
        allocation("auto", {"SLURM_JOB_NODELIST": "h[1-2]"})


def test_srun_fills_the_nodes_in_order() -> None:
    command = srun_command([("h3", 2), ("h1", 1)], ["python", "-m", "rank", "a b"])
    assert command[0] == "env"
    assert command[command.index("srun") :] == [
        "srun",
        "--distribution=arbitrary",
        "--nodes=2",
        "--ntasks=3",
        "--overlap",
        "--overcommit",
        "--cpu-bind=none",
        "--mpi=none",
        "--export=HOME,PATH,LD_LIBRARY_PATH,PYTHONPATH",
        "--nodelist=h3,h3,h1",
        "--kill-on-bad-exit=1",
        "--input=none",
        "--unbuffered",
        *("python", "-m", "rank", "a b"),
    ]
    unset = command[1 : command.index("srun")]
    assert unset[::2] == ["-u"] * (len(unset) // 2)
    assert {"SLURM_HOSTFILE", "SLURM_NTASKS_PER_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_TASK"} < set(unset[1::2])
    assert {"SLURM_LABELIO", "SLURM_EXCLUSIVE"} < set(unset[1::2])


def test_a_step_is_given_all_gpus_of_its_nodes() -> None:
    for command in (srun_command([("h3", 2)], ["x"], gpus=4), one_per_node(["h3"], ["x"], gpus=4)):
        assert "--gpus-per-node=4" in command


def test_one_task_per_node_reads_what_srun_reads() -> None:
    command = one_per_node(["h1", "h2"], ["probe"], container=PyxisContainer("img:1", ("/data", "/out put")))
    assert command[command.index("srun") + 1 :] == [
        "--distribution=arbitrary",
        "--nodes=2",
        "--ntasks=2",
        "--overlap",
        "--overcommit",
        "--cpu-bind=none",
        "--mpi=none",
        "--export=HOME,PATH,LD_LIBRARY_PATH,PYTHONPATH",
        "--container-image=img:1",
        "--container-mounts=/data:/data,/out put:/out put",
        "--nodelist=h1,h2",
        "--kill-on-bad-exit=0",
        "--input=all",
        "probe",
    ]


def test_an_mpi_is_named_and_a_mount_that_pyxis_would_misread_is_refused() -> None:
    assert "--mpi=pmix" in srun_command([("h1", 1)], ["x"], mpi="pmix")
    with pytest.raises(UserError, match="cannot be mounted"):
        srun_command([("h1", 1)], ["x"], container=PyxisContainer("image", ("/a,b",)))


@needs_horovod
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_ranks_are_horovods(counts: list[int]) -> None:
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.gloo_run import create_slot_env_vars

    rank = 0
    assigned = get_host_assignments([HostInfo(f"n{i}", count) for i, count in enumerate(counts)], sum(counts))
    for node, count in enumerate(counts):
        for local_rank in range(count):
            task = {
                "SLURMD_NODENAME": f"n{node}",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(local_rank),
                "SLURM_NODEID": str(node),
                "SLURM_STEP_TASKS_PER_NODE": compressed(counts),
            }
            assert rank_environment(task) == {
                name: value
                for name, value in create_slot_env_vars(assigned[rank]).items()
                if name in rank_environment(task)
            }
            rank += 1
    assert rank == len(assigned)
