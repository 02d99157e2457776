# Redis with Florence-2.
#
#     docker build -t florence .
#     docker run -p 6379:6379 -e FLORENCE_PASSWORD=secret -v florence-data:/data florence
#
# Settings follow: `-v florence-models:/models .. florence --florence.model /models/base-ft`.
FROM rust:1.95-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends libclang-14-dev cmake nasm \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY cli cli
COPY engine engine
COPY module module
COPY loadtests loadtests
COPY tests tests
COPY models models
RUN cargo build --release --locked -p florence-module -p florence-cli

# For CUDA devices: docker build --target cuda -t florence-cuda .
# and docker run --gpus all as above; settings stand in place of `--florence.device cuda`, so name it with them.
# Neither stage has been built or run yet.
FROM build AS build-cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY tools tools
RUN tools/cuda.py build

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends redis-server redis-tools \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o redis -g redis /data /models
COPY --from=build-cuda /src/target/cuda/release/libflorence.so /usr/lib/redis/modules/libflorence.so
COPY --from=build-cuda /src/target/cuda/release/florence /usr/bin/florence
COPY packaging/entrypoint.sh /usr/bin/florence-redis
USER redis
WORKDIR /data
VOLUME /data
EXPOSE 6379
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["florence-redis", "is-ready"]
ENTRYPOINT ["florence-redis"]
CMD ["--florence.device", "cuda"]

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="Florence for Redis" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
RUN apt-get update \
    && apt-get install -y --no-install-recommends redis-server redis-tools \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o redis -g redis /data /models
COPY --from=build /src/target/release/libflorence.so /usr/lib/redis/modules/libflorence.so
COPY --from=build /src/target/release/florence /usr/bin/florence
COPY packaging/entrypoint.sh /usr/bin/florence-redis
USER redis
WORKDIR /data
VOLUME /data
EXPOSE 6379
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["florence-redis", "is-ready"]
ENTRYPOINT ["florence-redis"]
