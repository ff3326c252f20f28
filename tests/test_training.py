"The loop that trains the mini models: two processes learn what one learns with the doubled batch."
import torch
import torch.multiprocessing as mp

from diclip.mini.training import fit, rank, read_log

X = torch.linspace(-1, 1, 16)[:, None]


def train(folder, steps=12):
    "A line fitted to a line; a process among several sees only its share of the data."
    torch.manual_seed(0)
    several = torch.distributed.is_initialized()
    x = X[rank()::torch.distributed.get_world_size()] if several else X
    model = torch.nn.Linear(1, 1)
    def batch_loss(step):
        loss = (model(x) - (3 * x + 1)).pow(2).mean()
        return loss, dict(loss=loss.item())
    return fit(model, batch_loss, folder, .1, len(x), steps=steps, every=4)


def process(number, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    average = train(f"{folder}/two")
    torch.save(average, f"{folder}/average{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    alone = train(tmp_path / "one")
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    averages = [torch.load(tmp_path / f"average{n}.pt", weights_only=True) for n in (0, 1)]
    for k in alone:
        for other in averages: torch.testing.assert_close(other[k], alone[k], atol=1e-5, rtol=1e-5)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [l["step"] for l in one] == [l["step"] for l in two] and one[-1]["pictures"] == two[-1]["pictures"] == 12 * 16
