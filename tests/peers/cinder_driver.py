#!/usr/bin/env python3
"""OpenStack Cinder's own backup drivers, for tests: reads commands and runs them, as cinder-backup would.

    cinder_driver.py FOLDER DRIVER [OPTION=VALUE ...]

With the variable GCS_URL, Google Cloud Storage is there.

Needs the Python that `dev/cinder.sh` prints. DRIVER is what Cinder calls backup_driver, an OPTION one of Cinder's in
[DEFAULT]. The database lies in FOLDER; there is no other service. A command is a line of JSON on standard input,
{"do": NAME, ...arguments}; the answer is a line on standard output, {"ok": ...} or {"error": ...}. The methods of `Peer`
are the commands. Volumes and backups are named by their ids. Where a volume is to be opened, that is
{"image": "POOL/IMAGE"} or {"file": PATH}.
"""
import json
import logging
import os
import sys
import warnings

warnings.filterwarnings('ignore')

from oslo_config import cfg                                     # noqa: E402
from oslo_log import log                                        # noqa: E402
from oslo_utils import importutils                              # noqa: E402

from cinder import objects                                      # noqa: E402
objects.register_all()
from cinder.common import config                                # noqa: E402,F401
from cinder import context                                      # noqa: E402
from cinder.backup import manager                               # noqa: E402
from cinder.db import api as db                                 # noqa: E402
from cinder.db import migration                                 # noqa: E402
from cinder import rpc                                          # noqa: E402
from cinder.volume import volume_types                          # noqa: E402

def find_gcs_at(url):
    """Lets Google's client find the JSON API there: it has no setting for that, but a document that says where it is."""
    from googleapiclient import discovery, discovery_cache
    document = json.loads(discovery_cache.get_static_doc('storage', 'v1'))
    document.update(rootUrl=url + '/', baseUrl=url + '/storage/v1/', mtlsRootUrl=url + '/')
    discovery.build = lambda name, version, cache_discovery, credentials: discovery.build_from_document(
        document, credentials=credentials)


NOWHERE = '00000000-0000-0000-0000-000000000000'
CONFIGURATION = """
[DEFAULT]
state_path = {folder}
transport_url = fake:/
host = node1
backup_driver = {driver}
{options}
[database]
connection = sqlite:///{folder}/cinder.sqlite
[oslo_concurrency]
lock_path = {folder}/locks
"""


class Peer:
    def __init__(self, folder, driver, *options):
        path = folder + '/cinder.conf'
        with open(path, 'w') as f:
            f.write(CONFIGURATION.format(folder=folder, driver=driver, options='\n'.join(options)))
        log.register_options(cfg.CONF)
        cfg.CONF([], project='cinder', default_config_files=[path])
        rpc.init(cfg.CONF)
        migration.db_sync()
        self.driver_name = driver
        self.driver_class = importutils.import_class(driver)
        self.context = context.RequestContext(user_id='user', project_id='project', is_admin=True)
        self.manager = manager.BackupManager(host='node1')
        self.manager.is_initialized = True

    def driver(self):
        return self.driver_class(self.context)

    def set(self, **options):
        """Gives options of [DEFAULT] other values."""
        for option, value in options.items():
            cfg.CONF.set_override(option, value)

    def add_volume(self, volume_id, gib):
        """Enters a volume into the database."""
        db.volume_create(self.context, {
            'id': volume_id, 'size': gib, 'status': 'backing-up', 'display_name': 'data', 'host': 'node1@rbd#rbd',
            'user_id': 'user', 'project_id': 'project', 'availability_zone': 'nova', 'attach_status': 'detached',
            'volume_type_id': volume_types.get_default_volume_type()['id'], 'use_quota': True,
            'metadata': {'color': 'blue'}})

    def change_volume(self, volume_id, **values):
        """Changes what the database says of a volume."""
        db.volume_update(self.context, volume_id, values)

    def show_volume(self, volume_id):
        volume = objects.Volume.get_by_id(self.context, volume_id)
        return {'display_name': volume.display_name, 'metadata': dict(volume.metadata)}

    def volume_meta(self, volume_id):
        """What a backup keeps about a volume."""
        return self.driver().get_metadata(volume_id)

    def open(self, volume, mode):
        if 'file' in volume:
            return open(volume['file'], mode)
        from os_brick.initiator import linuxrbd
        pool, name = volume['image'].split('/')
        user, conf = cfg.CONF.backup_ceph_user, cfg.CONF.backup_ceph_conf
        client = linuxrbd.RBDClient(user, pool, conffile=conf)
        image = linuxrbd.RBDVolume(client, name)
        return linuxrbd.RBDVolumeIOWrapper(linuxrbd.RBDImageMetadata(image, pool, user, conf))

    def backup(self, backup_id, volume_id, source, parent_id=None, snapshot_id=None, container=None):
        volume = objects.Volume.get_by_id(self.context, volume_id)
        parent = objects.Backup.get_by_id(self.context, parent_id) if parent_id else None
        db.backup_create(self.context, {
            'id': backup_id, 'user_id': 'user', 'project_id': 'project', 'volume_id': volume_id,
            'status': 'creating', 'display_name': 'nightly', 'size': volume.size, 'host': 'node1',
            'availability_zone': 'nova', 'parent_id': parent_id, 'snapshot_id': snapshot_id, 'service': self.driver_name,
            'container': container})
        backup = objects.Backup.get_by_id(self.context, backup_id)
        backup.parent = parent
        backup.data_timestamp = backup.created_at
        backup.save()
        try:
            with self.open(source, 'rb') as file:
                updates = self.driver().backup(backup, file)
        except Exception as error:
            backup.status, backup.fail_reason = 'error', str(error)[:255]
            backup.save()
            raise
        backup.update(updates or {})
        backup.status = 'available'
        backup.save()

    def restore(self, backup_id, volume_id, target, new):
        self.restore_with(self.driver(), backup_id, volume_id, target, new)

    def restore_as_28(self, backup_id, volume_id, target):
        """Restores onto a new volume as Cinder up to 28 did: each backup of a chain as if it were the first."""
        driver = self.driver()
        restore = driver._restore_v1
        driver._restore_v1 = lambda backup, volume_id, metadata, file, new, requested: restore(
            backup, volume_id, metadata, file, True, requested)
        self.restore_with(driver, backup_id, volume_id, target, True)

    def restore_with(self, driver, backup_id, volume_id, target, new):
        backup = objects.Backup.get_by_id(self.context, backup_id)
        backup.status = 'restoring'
        backup.save()
        try:
            with self.open(target, 'r+b') as file:
                driver.restore(backup, volume_id, file, new)
        finally:
            backup.status = 'available'
            backup.save()

    def delete(self, backup_id):
        backup = objects.Backup.get_by_id(self.context, backup_id)
        backup.status = 'deleting'
        backup.save()
        self.manager.delete_backup(self.context, backup)

    def export_record(self, backup_id):
        return self.manager.export_record(self.context, objects.Backup.get_by_id(self.context, backup_id))

    def import_record(self, backup_service, backup_url):
        backup_id = objects.Backup.decode_record(backup_url)['id']
        db.backup_create(self.context, {
            'id': backup_id, 'user_id': 'user', 'project_id': 'project', 'volume_id': NOWHERE, 'status': 'creating'})
        backup = objects.BackupImport.get_by_id(self.context, backup_id)
        self.manager.import_record(self.context, backup, backup_service, backup_url, [])


def main():
    if 'GCS_URL' in os.environ:
        find_gcs_at(os.environ['GCS_URL'])
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    peer = Peer(*sys.argv[1:])
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {'ok': getattr(peer, arguments.pop('do'))(**arguments)}
        except Exception as error:
            logging.exception('%s', arguments)
            answer = {'error': '%s: %s' % (type(error).__name__, error)}
        print(json.dumps(answer), flush=True)


main()
