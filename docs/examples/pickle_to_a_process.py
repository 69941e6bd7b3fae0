"""Anything that can be pickled, to another process, without a look at what is in it."""

import multiprocessing

import torch

import shmx


def work(pipe):
    model = shmx.loads(pipe.recv_bytes())  # its parameters came through shared memory
    pipe.send_bytes(shmx.dumps(model(torch.ones(512)), readers=1))


if __name__ == "__main__":
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(there,))
    worker.start()
    here.send_bytes(shmx.dumps(torch.nn.Linear(512, 512), readers=1))
    assert shmx.loads(here.recv_bytes()).shape == (512,)
    worker.join()
