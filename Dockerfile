# The page in a container that needs no rights and writes to its volume and to /tmp alone:
#   docker build -t peftlab . && docker run --read-only --tmpfs /tmp -v peftlab:/home/user/data -p 7860:7860 peftlab
# The network reaches it then; -p 127.0.0.1:7860:7860 is for this machine alone. -e PEFTLAB_KEY=a-word and the like set what a host
# may set (README.md). The model is downloaded into the volume at the first start.
# For an NVIDIA GPU, build with --build-arg TORCH=https://download.pytorch.org/whl/cu128 and run with --gpus all.
FROM python:3.12-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN useradd --create-home --uid 1000 user && install --directory --owner user /home/user/data
WORKDIR /home/user/app
COPY requirements.txt ./
RUN pip install --no-cache-dir "torch>=2.8,<2.14" --index-url ${TORCH} && pip install --no-cache-dir -r requirements.txt
COPY app.py LICENSE ./
COPY demos demos
COPY peftlab peftlab
COPY assets assets
USER user
ENV PEFTLAB_DATA=/home/user/data PEFTLAB_CACHE=/home/user/data/models HF_HOME=/home/user/data/huggingface
ENV GRADIO_SERVER_NAME=0.0.0.0 GRADIO_ANALYTICS_ENABLED=False
EXPOSE 7860
VOLUME /home/user/data
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/healthz', timeout=5)"]
CMD ["python", "app.py"]
