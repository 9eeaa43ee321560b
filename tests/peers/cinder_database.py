#!/usr/bin/env python3
"""OpenStack Cinder's own access to its database, for tests: what the API and other services write and read there.

    cinder_database.py CONNECTION FOLDER

Needs the Python that `dev/cinder.sh` prints. The schema is made if it is not there. A command is a line of JSON on standard
input, {"do": NAME, ...arguments}; the answer is a line on standard output, {"ok": ...} or {"error": ...}. The methods of
`Peer` are the commands.
"""
import datetime
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
import warnings

warnings.filterwarnings('ignore')

from oslo_config import cfg                                     # noqa: E402
from oslo_log import log                                        # noqa: E402
from oslo_utils import timeutils                                # noqa: E402

from cinder import objects                                      # noqa: E402
objects.register_all()
from cinder.common import config                                # noqa: E402,F401
from cinder import context                                      # noqa: E402
from cinder import quota                                        # noqa: E402
from cinder.backup import driver                                # noqa: E402
from cinder.db import api as db                                 # noqa: E402
from cinder.db import migration                                 # noqa: E402
from cinder.db import models                                    # noqa: E402
from cinder.message import api as message_api                   # noqa: E402
from cinder.message import message_field                        # noqa: E402
from cinder.volume import volume_types                          # noqa: E402

CONFIGURATION = """
[DEFAULT]
state_path = {folder}
transport_url = fake:/
host = node1
quota_backups = -1
quota_backup_gigabytes = -1
[database]
connection = {connection}
[oslo_concurrency]
lock_path = {folder}/locks
"""
MODELS = {model.__tablename__: model for model in (
    models.Backup, models.BackupMetadata, models.Message, models.QuotaUsage, models.Reservation, models.Service,
    models.Snapshot, models.Volume, models.VolumeGlanceMetadata, models.VolumeMetadata)}


def plain(value):
    return value.isoformat() if isinstance(value, datetime.datetime) else value


class Peer:
    def __init__(self, connection, folder):
        path = folder + '/cinder.conf'
        with open(path, 'w') as f:
            f.write(CONFIGURATION.format(folder=folder, connection=connection.replace('$', '$$')))
        log.register_options(cfg.CONF)
        cfg.CONF([], project='cinder', default_config_files=[path])
        # Tests that run at once share a server.
        name = hashlib.sha256(connection.encode()).hexdigest()[:16]
        with open(os.path.join(tempfile.gettempdir(), f'backhaul-schema-{name}.lock'), 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            migration.db_sync()
        self.context = context.RequestContext(user_id='user', project_id='project', is_admin=True, read_deleted='no')

    def create(self, table, **values):
        """Makes a row, as the API does, and answers its id."""
        if table == 'volumes':
            values.setdefault('volume_type_id', volume_types.get_default_volume_type(self.context)['id'])
            return db.volume_create(self.context, values)['id']
        if table == 'snapshots':
            values.setdefault('volume_type_id', volume_types.get_default_volume_type(self.context)['id'])
            return db.snapshot_create(self.context, values)['id']
        if table == 'backups':
            for name in ('data_timestamp',):
                if name in values:
                    values[name] = timeutils.normalize_time(timeutils.parse_isotime(values[name]))
            backup = objects.Backup(self.context, **values)
            backup.create()
            return backup.id
        raise ValueError(table)

    def set(self, table, id, **values):
        """Sets columns of a row."""
        with db.main_context_manager.writer.using(self.context):
            self.context.session.query(MODELS[table]).filter_by(id=id).update(values)

    def rows(self, table, **filters):
        """All rows with these values, deleted ones too."""
        with db.main_context_manager.reader.using(self.context):
            model = MODELS[table]
            found = self.context.session.query(model).filter_by(**filters).order_by(model.id).all()
            return [{column.name: plain(getattr(row, column.key)) for column in model.__mapper__.columns} for row in found]

    def backup_object(self, id):
        """A backup as other services send it."""
        backup = objects.Backup.get_by_id(self.context.elevated(read_deleted='yes'), id)
        return backup.obj_to_primitive()['versioned_object.data']

    def use(self, project, **amounts):
        """Takes something of a project's quotas, as the API does."""
        reservations = quota.QUOTAS.reserve(self.context, project_id=project, **amounts)
        quota.QUOTAS.commit(self.context, reservations, project_id=project)

    def volume_meta(self, volume_id):
        return json.loads(driver.BackupMetadataAPI(self.context).get(volume_id))

    def restore_volume_meta(self, volume_id, text):
        driver.BackupMetadataAPI(self.context).put(volume_id, text)

    def set_metadata(self, volume_id, pairs):
        db.volume_metadata_update(self.context, volume_id, pairs, False)

    def set_glance_metadata(self, volume_id, pairs):
        db.volume_glance_metadata_bulk_create(self.context, volume_id, pairs)

    def volume_metadata(self, volume_id):
        return db.volume_metadata_get(self.context, volume_id)

    def glance_metadata(self, volume_id):
        try:
            return {row.key: row.value for row in db.volume_glance_metadata_get(self.context, volume_id)}
        except Exception:
            return {}

    def service(self, host):
        """Whether the API would give it jobs, and what else it says of itself."""
        service = objects.Service.get_by_args(self.context, host, 'cinder-backup')
        return {'is_up': service.is_up, 'id': service.id, 'disabled': service.disabled,
                'availability_zone': service.availability_zone, 'rpc_current_version': service.rpc_current_version,
                'object_current_version': service.object_current_version, 'report_count': service.report_count}

    def remove_service(self, id):
        db.service_destroy(self.context, id)

    def message(self, project, resource_id):
        """Leaves a message about a failed backup as Cinder's worker does."""
        ours = context.RequestContext(user_id='user', project_id=project, is_admin=True, request_id='req-1')
        message_api.API().create(ours, ('013', 'create backup'), 'VOLUME_BACKUP', resource_id, detail=message_field.Detail.BACKUP_CREATE_DRIVER_ERROR)


def main():
    logging.disable(logging.CRITICAL)
    peer = Peer(*sys.argv[1:])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {'ok': getattr(peer, command.pop('do'))(**command)}
        except Exception as error:
            answer = {'error': f'{type(error).__name__}: {error}'}
        print(json.dumps(answer), flush=True)


main()
