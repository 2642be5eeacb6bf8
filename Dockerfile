# From a checkout: docker build -t mae .
#   docker run --rm --gpus all --shm-size 8g -v /path/to/images:/data -v $PWD/runs:/runs mae \
#       pretrain --data.root /data --run_dir /runs/mine
# The usual torch brings CUDA and needs an NVIDIA driver only; without --gpus it computes on the CPU.
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir "/src[tensorboard]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["mae"]
CMD ["--help"]
