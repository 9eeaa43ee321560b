# The worker and the command line in one image: docker build -t backhaul .

FROM rust:1.95-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends librados-dev librbd-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
RUN cargo build --locked --release

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates librados2 librbd1 \
    && rm -rf /var/lib/apt/lists/*
# The folders are made here so that volumes mounted on them belong to the user that the worker runs as.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin backhaul \
    && install --directory --owner backhaul --group backhaul /var/backups/backhaul /var/lib/volumes
COPY --from=build /build/target/release/backhaul /usr/local/bin/backhaul
# A share of an NFS server is best mounted from outside, as a volume; set path then. To let the worker mount it (share), add
# nfs-common and mount to the packages above, and run the container as root with --cap-add SYS_ADMIN.
USER backhaul
# The configuration is mounted here; any setting can also come from the environment, such as BACKHAUL_BROKER__URL.
ENV BACKHAUL_CONFIG=/etc/backhaul/backhaul.toml
HEALTHCHECK --interval=60s --timeout=20s --start-period=20s CMD ["backhaul", "check"]
ENTRYPOINT ["backhaul"]
CMD ["worker"]
