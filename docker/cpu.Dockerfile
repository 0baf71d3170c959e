# surgery without CUDA, from a clone: docker build -f docker/cpu.Dockerfile -t surgery .
# docker run -v "$PWD:/models" --user "$(id -u)" surgery merge base/ lora/ -o merged/
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir build==1.6.1 && python -m build --wheel --outdir /dist

FROM python:3.11-slim
WORKDIR /tmp
COPY --from=build /dist /src/constraints.txt ./
# CPU builds of torch and onnxruntime: the extra onnx would bring onnxruntime-gpu, whose files are those of onnxruntime.
# hadolint ignore=DL3013
RUN wheel="$(echo ./*.whl)" \
 && pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" \
 && pip install --no-cache-dir --constraint constraints.txt onnx onnxruntime==1.31.1 tokenizers "${wheel}[hub,gguf,cloud]" \
 && rm -r ./*
# Whoever runs it may have no home: what the hub sends lies here. Mount a folder to keep it.
ENV HF_HOME=/tmp/huggingface
USER 1000
WORKDIR /models
ENTRYPOINT ["surgery"]
CMD ["--help"]
