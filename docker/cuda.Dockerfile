# surgery on GPUs, from a clone: docker build -f docker/cuda.Dockerfile -t surgery:cuda .
# docker run --gpus all -v "$PWD:/models" --user "$(id -u)" surgery:cuda env --deep
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir build==1.6.1 && python -m build --wheel --outdir /dist

# torch and onnxruntime-gpu bring CUDA and cuDNN as packages: an image of CUDA would hold them twice.
FROM python:3.11-slim
WORKDIR /tmp
COPY --from=build /dist /src/constraints.txt ./
# hadolint ignore=DL3013
RUN wheel="$(echo ./*.whl)" \
 && pip install --no-cache-dir --constraint constraints.txt "${wheel}[all,cuda]" \
 && rm -r ./*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Whoever runs it may have no home: what the hub sends lies here. Mount a folder to keep it.
ENV HF_HOME=/tmp/huggingface
USER 1000
WORKDIR /models
ENTRYPOINT ["surgery"]
CMD ["--help"]
