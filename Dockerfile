# kvconvert in an image. Without arguments PyPI's torch is taken, which brings CUDA; for a machine without a GPU:
#
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu --tag kvconvert .
#   docker run --rm --volume "$PWD:/work" --user "$(id -u):$(id -g)" kvconvert inspect model_dir
#
# With GPUs add `--gpus all`. HF_HOME is /work/.hf, so that what is downloaded stays on the host.
FROM python:3.12-slim AS wheel
COPY . /source
RUN pip install --no-cache-dir build && python -m build --outdir /wheel /source

FROM python:3.12-slim
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=eval,plot
COPY --from=wheel /wheel/*.whl /tmp/
RUN pip install --no-cache-dir torch --index-url "$TORCH_INDEX" \
    && pip install --no-cache-dir "$(echo /tmp/*.whl)[$EXTRAS]" \
    && rm /tmp/*.whl
ENV HF_HOME=/work/.hf HOME=/tmp
WORKDIR /work
ENTRYPOINT ["kvconvert"]
CMD ["--help"]
