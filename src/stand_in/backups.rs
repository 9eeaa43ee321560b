//! What Cinder asks for: a backup made, restored, deleted. What each changes in the database is what Cinder's own service would
//! change, but that a message which comes a second time, after all was done, changes nothing.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::attach::{Attached, Wanted};
use super::jobs::{Ran, lasting};
use super::notices::Progress;
use super::{Driver, StandIn, TOPIC, Trouble};
use crate::cinder::database::{self, BackupRow, Changes, QuotaRefresh, Restored, UserMessage, VolumeRow};
use crate::cinder::export_record;
use crate::cinder::rpc::{Incoming, Target};
use crate::cinder::volumes::{VolumeService, object_of, snapshot_object_of};
use crate::error::{Causes, Class, Problem};
use crate::job::{BackupId, BackupWork, Job, JobId, Parent, Record, RestoreWork, VolumeId, Work};
use crate::message::oslo::{self, BackupDevice, BackupDeviceInfo, Failure, Request};
use crate::runner::Place;

pub(super) const CREATE: Action =
    Action { id: "013", name: "create backup", event: "create", percent: "backup_percent" };
const DELETE: Action = Action { id: "014", name: "delete backup", event: "delete", percent: "" };
pub(super) const RESTORE: Action =
    Action { id: "015", name: "restore backup", event: "restore", percent: "restore_percent" };

/// What is done with a backup, in the words of Cinder's messages to users and of its notifications.
#[derive(Clone, Copy)]
pub(super) struct Action {
    id: &'static str,
    name: &'static str,
    /// What its notifications begin with.
    pub event: &'static str,
    /// What they call it how far it is.
    pub percent: &'static str,
}

/// Why it came to nothing, in the numbers of the same.
#[derive(Clone, Copy)]
enum Detail {
    BackupStatus,
    Create,
    Attach,
    Detach,
    Delete,
    Restore,
    VolumeStatus,
    /// It was made, but not as an incremental one.
    ForcedFull,
}

impl Detail {
    fn id(self) -> &'static str {
        match self {
            Self::BackupStatus => "017",
            Self::Create => "020",
            Self::Attach => "021",
            Self::Detach => "022",
            Self::Delete => "025",
            Self::Restore => "026",
            Self::VolumeStatus => "027",
            Self::ForcedFull => "030",
        }
    }

    fn level(self) -> &'static str {
        if let Self::ForcedFull = self { "WARNING" } else { "ERROR" }
    }
}

impl StandIn {
    /// Takes a new backup on, and asks the volume service for what is to be read for it.
    pub(super) async fn create_backup(&self, request: &Request) -> Result<Value, Trouble> {
        let mut backup = oslo::Backup::read(request.arg("backup")?)?;
        let id = backup.id;
        let row = self.row(id).await?;
        if row.status != "creating" {
            // Cinder would call it failed; but it may have been made already.
            info!(backup = %id, status = row.status, "not to be made any more");
            let used = self.use_of(id);
            // Whoever is at it ends first.
            let _turn = used.turn.lock().await;
            if !row.awaits_end() {
                self.database.give_source_back(&row.id).await?;
            }
            return Ok(Value::Null);
        }
        self.tell_start(request, id, CREATE).await;
        let fail = async |detail, reason: &str| self.fail_backup(request, id, detail, reason).await;
        let Some(volume) = self.database.volume(&row.volume_id).await? else {
            let reason = format!("Volume {} could not be found.", row.volume_id);
            return fail(Detail::Create, &reason).await;
        };
        let (what, status) = match &row.snapshot_id {
            Some(id) => {
                ("snapshot", self.database.snapshot(id).await?.map_or_else(String::new, |found| found.status))
            }
            None => ("volume", volume.status.clone()),
        };
        if status != "backing-up" {
            let reason =
                format!("Create backup aborted, expected {what} status backing-up but got {status}.");
            return fail(Detail::Create, &reason).await;
        }
        let copied = match &row.encryption_key_id {
            Some(_) => None,
            None => match self.key_for_backup(&request.context, id, &volume).await? {
                Ok(copied) => copied,
                Err(problem) => return fail(Detail::Create, &problem.to_string()).await,
            },
        };
        let (service, zone) = (self.driver.class(), &self.capabilities.availability_zone);
        let mut changes = Changes::new().text("service", service);
        backup.object.set("service", json!(service));
        if row.availability_zone.is_none() {
            changes = changes.text("availability_zone", zone);
            backup.object.set("availability_zone", json!(zone));
        }
        if let Some(key) = copied.as_ref().or(row.encryption_key_id.as_ref()) {
            changes = changes.text("encryption_key_id", key);
            backup.object.set("encryption_key_id", json!(key));
        }
        if !self.database.change_backup(&row.id, &["creating"], &changes).await? {
            if let Some(key) = copied {
                self.drop_copy(&request.context, &key).await;
            }
            return Ok(Value::Null);
        }
        let context = context_of(request, id, CREATE);
        let asked = match self.volume_service(&volume, &context) {
            Ok(volumes) => {
                volumes.get_backup_device(backup.object.to_json()).await.map_err(|error| problem(&error))
            }
            Err(homeless) => Err(homeless),
        };
        if let Err(problem) = asked {
            return fail(Detail::Attach, &problem.to_string()).await;
        }
        info!(backup = %id, volume = row.volume_id, "backup taken on");
        Ok(Value::Null)
    }

    /// Makes a backup of what the volume service gives for it.
    pub(super) async fn continue_backup(&self, incoming: &Incoming) -> Result<Value, Trouble> {
        let request = &incoming.request;
        let id = oslo::Backup::read(request.arg("backup")?)?.id;
        let BackupDeviceInfo { device, secure_enabled } =
            BackupDeviceInfo::read(request.arg("backup_device")?)?;
        let used = self.use_of(id);
        let _turn = used.turn.lock().await;
        let row = self.row(id).await?;
        let fail = async |detail, reason: &str| self.fail_backup(request, id, detail, reason).await;
        let context = context_of(request, id, CREATE);
        let (volume, snapshot) = match device {
            BackupDevice::Volume(volume) => (Some(volume), None),
            BackupDevice::Snapshot(snapshot) => {
                let columns = self.database.volume_columns(&snapshot.volume_id.to_string()).await?;
                let volume = columns
                    .map(|columns| oslo::Volume { id: snapshot.volume_id, object: object_of(columns) });
                (volume, Some(snapshot))
            }
        };
        let described = volume.as_ref().map(|volume| volume.object.to_json()).unwrap_or_default();
        let volumes = volume.as_ref().and_then(|volume| {
            Some(VolumeService::new(&self.rpc, volume.service()?, &context, volume.id, self.reply_time_max()))
        });
        let wanted = volumes.as_ref().map(|volumes| Wanted {
            volumes,
            volume: &described,
            snapshot: snapshot.as_ref().map(|snapshot| snapshot.id.as_str()),
            secure: Some(secure_enabled),
        });
        if !self.is_awaited(&row).await? {
            return self.leave_backup(incoming, id, &row, wanted).await;
        }
        let Some(wanted) = wanted else {
            let reason = match &volume {
                Some(volume) => format!("Volume {} is on no host.", volume.id),
                None => format!("Volume {} could not be found.", row.volume_id),
            };
            return fail(Detail::Attach, &reason).await;
        };
        let unwanted = self.await_other_status(id, &used.cancel, BEING_MADE);
        let Some(_place) = self.place(&row, unwanted).await? else {
            let left = self.leave_backup(incoming, id, &self.row(id).await?, Some(wanted)).await;
            self.tell_end(request, id, CREATE).await;
            return left;
        };
        let unwanted = self.await_other_status(id, &used.cancel, BEING_MADE);
        let attachment = self.attach(wanted, unwanted).await;
        let ran = match &attachment.attached {
            Ok(attached) => self.make(request, id, &row, attached, &used.cancel).await,
            Err(why) => why.ended(),
        };
        let is_attached = attachment.attached.is_ok();
        if !self.detach(wanted.volumes, attachment).await {
            self.tell_user(request, ("VOLUME_BACKUP", &id.to_string()), CREATE, Detail::Detach).await;
        }
        let detail = if is_attached { Detail::Create } else { Detail::Attach };
        let ended = self.end_backup(request, &row, id, ran?, detail).await;
        // Not before: whoever goes on with the message reads it once more.
        if let Ok(_) | Err(Trouble::Failure(_)) = ended {
            self.remove_temporary(&context, &row).await?;
        }
        ended
    }

    /// Gives back what was to be read for a backup that is not to be made any more.
    async fn leave_backup(
        &self,
        incoming: &Incoming,
        id: BackupId,
        row: &BackupRow,
        wanted: Option<Wanted<'_>>,
    ) -> Result<Value, Trouble> {
        let request = &incoming.request;
        info!(backup = %id, status = row.status, "not to be made any more");
        match (incoming.redelivered, row.status.as_str(), wanted) {
            (true, "available", _) => self.tell_end(request, id, CREATE).await,
            (true, _, Some(wanted)) if self.is_free(wanted.volumes.volume_id()).await? => {
                self.detach_left(wanted).await;
            }
            _ => {}
        }
        self.database.give_source_back(&row.id).await?;
        self.remove_temporary(&request.context, row).await?;
        Ok(Value::Null)
    }

    /// Writes down how a backup has ended; `detail` is where it has failed, if so.
    async fn end_backup(
        &self,
        request: &Request,
        row: &BackupRow,
        id: BackupId,
        ran: Ran,
        detail: Detail,
    ) -> Result<Value, Trouble> {
        let fail = async |detail, reason: &str| self.fail_backup(request, id, detail, reason).await;
        match ran {
            Ran::Succeeded => {
                let record = match self.made(request, id).await? {
                    Ok(record) => record,
                    Err(problem) => return fail(Detail::Create, &problem.to_string()).await,
                };
                let ended = self.database.finish_backup(&row.id, &self.changes_of(&record)).await?;
                info!(backup = %id, ?ended, "backup made");
                if row.parent_id.is_some() && record.parent_id.is_none() {
                    let volume = ("VOLUME", row.volume_id.as_str());
                    self.tell_user(request, volume, CREATE, Detail::ForcedFull).await;
                }
            }
            Ran::Failed(problem) => return fail(detail, &problem.to_string()).await,
            // Its row says what it has become, and only the volume is given back.
            Ran::Cancelled => {
                self.database.fail_backup(&row.id, "The backup was cancelled.").await?;
            }
        }
        self.tell_end(request, id, CREATE).await;
        Ok(Value::Null)
    }

    async fn make(
        &self,
        request: &Request,
        id: BackupId,
        row: &BackupRow,
        attached: &Attached,
        cancel: &CancellationToken,
    ) -> Result<Ran, Trouble> {
        let engine = match self.engine(request).await? {
            Ok(engine) => engine.with_volumes(attached.volumes.clone()),
            Err(problem) => return Ok(Ran::Failed(problem)),
        };
        let (volume_id, parent_id, container) = match work_of(row) {
            Ok(ids) => ids,
            Err(problem) => return Ok(Ran::Failed(problem)),
        };
        if let Some(parent_id) = parent_id
            && let Err(problem) = self.take_in(&engine, parent_id).await?
        {
            return Ok(Ran::Failed(problem));
        }
        let work = BackupWork {
            backup_id: id,
            volume_id,
            source: attached.location.clone(),
            parent: parent_id.map_or(Parent::None, Parent::Given),
            container,
            name: row.display_name.clone(),
            description: row.display_description.clone(),
            project_id: row.project_id.clone(),
            volume_meta: Some(self.database.volume_meta(&row.volume_id).await?),
        };
        // The same backup is always made by the same job, so that whoever is handed the message goes on with it.
        let job_id = id.to_string().parse().unwrap_or_else(|_| JobId::random());
        let job = Job { id: job_id, store: None, deadline: None, work: Work::Backup(work) };
        let progress = Progress { worker: self, request, id, action: CREATE };
        self.run(&engine, &job, cancel, BEING_MADE, &progress).await
    }

    /// What the row of a backup says once it is made, as Cinder's driver would have it.
    fn changes_of(&self, record: &Record) -> Changes {
        let parent_id = record.parent_id.map(|id| id.to_string());
        let object_count = match self.driver {
            // Cinder counts no objects of images.
            Driver::Ceph => 0,
            _ => record.counts.object_count.try_into().unwrap_or(i64::MAX),
        };
        Changes::new()
            .text("container", record.container.as_str())
            // Cinder keeps none of some images.
            .text_or_null(
                "service_metadata",
                Some(record.service_metadata.as_str()).filter(|text| !text.is_empty()),
            )
            .integer("object_count", object_count)
            // It may have become a full one.
            .text_or_null("parent_id", parent_id.as_deref())
    }

    /// Puts a backup onto a volume.
    pub(super) async fn restore_backup(&self, incoming: &Incoming) -> Result<Value, Trouble> {
        let request = &incoming.request;
        let id = oslo::Backup::read(request.arg("backup")?)?.id;
        let volume_id: VolumeId =
            request.text("volume_id")?.parse().map_err(|error: <VolumeId as std::str::FromStr>::Err| {
                Trouble::Failure(Failure::invalid_input(&error.to_string()))
            })?;
        let used = self.use_of(id);
        let _turn = used.turn.lock().await;
        let row = self.row(id).await?;
        let volume = self.database.volume(&volume_id.to_string()).await?;
        let is_done = volume.as_ref().is_some_and(|volume| volume.status == "available");
        let Some(volume) = volume.filter(|volume| AWAITING.contains(&volume.status.as_str())) else {
            info!(backup = %id, volume = %volume_id, "the volume does not wait for a restore any more");
            // After a restore that was done neither waits for anything.
            if self.database.refuse_restore(&row.id, &volume_id.to_string()).await? {
                let reason = "Restore backup aborted, the volume does not wait for a restore any more.";
                self.tell_error(request, id, RESTORE, reason).await;
                let volume = ("VOLUME_BACKUP", &*volume_id.to_string());
                self.tell_user(request, volume, RESTORE, Detail::VolumeStatus).await;
            }
            if incoming.redelivered && is_done {
                self.tell_end(request, id, RESTORE).await;
            }
            return Ok(Value::Null);
        };
        self.tell_start(request, id, RESTORE).await;
        let end = async |restored, detail, reason: &str| {
            self.fail_restore(request, (id, volume_id), restored, detail, reason).await
        };
        let context = context_of(request, id, RESTORE);
        let volumes = self.volume_service(&volume, &context);
        let columns = self.database.volume_columns(&volume.id).await?.unwrap_or_default();
        let described = object_of(columns).to_json();
        let wanted = |volumes| Wanted { volumes, volume: &described, snapshot: None, secure: None };
        if row.status != "restoring" {
            if let (true, Ok(volumes)) = (incoming.redelivered, &volumes) {
                self.detach_left(wanted(volumes)).await;
            }
            let reason = format!("expected backup status restoring but got {}.", row.status);
            return end(Restored::Refused, Detail::BackupStatus, &reason).await;
        }
        if !self.driver.made(row.service.as_deref()) {
            return end(Restored::Refused, Detail::Restore, &self.not_ours(&row)).await;
        }
        let fail = async |detail, reason: &str| end(Restored::Failed, detail, reason).await;
        let volumes = match &volumes {
            Ok(volumes) => volumes,
            Err(problem) => return fail(Detail::Attach, &problem.to_string()).await,
        };
        let unwanted = self.await_other_status(id, &used.cancel, BEING_RESTORED);
        let Some(_place) = self.place(&row, unwanted).await? else {
            if incoming.redelivered {
                self.detach_left(wanted(volumes)).await;
            }
            return self.end_cancelled_restore(request, id, volume_id).await;
        };
        let unwanted = self.await_other_status(id, &used.cancel, BEING_RESTORED);
        let attachment = self.attach(wanted(volumes), unwanted).await;
        let ran = match &attachment.attached {
            Ok(attached) => {
                self.put_back(request, (id, &row), (volume_id, &volume), attached, &used.cancel).await
            }
            Err(why) => why.ended(),
        };
        let is_attached = attachment.attached.is_ok();
        if !self.detach(volumes, attachment).await {
            self.tell_user(request, ("VOLUME_BACKUP", &id.to_string()), RESTORE, Detail::Detach).await;
        }
        match ran? {
            Ran::Succeeded => {
                self.database.finish_restore(&row.id, &volume.id, Restored::Done).await?;
                info!(backup = %id, volume = %volume_id, "backup restored");
                self.tell_end(request, id, RESTORE).await;
                Ok(Value::Null)
            }
            Ran::Cancelled => self.end_cancelled_restore(request, id, volume_id).await,
            Ran::Failed(problem) => {
                let detail = if is_attached { Detail::Restore } else { Detail::Attach };
                fail(detail, &problem.to_string()).await
            }
        }
    }

    async fn end_cancelled_restore(
        &self,
        request: &Request,
        id: BackupId,
        volume_id: VolumeId,
    ) -> Result<Value, Trouble> {
        self.database.finish_restore(&id.to_string(), &volume_id.to_string(), Restored::Cancelled).await?;
        info!(backup = %id, volume = %volume_id, "restore cancelled");
        self.tell_end(request, id, RESTORE).await;
        Ok(Value::Null)
    }

    async fn put_back(
        &self,
        request: &Request,
        (id, row): (BackupId, &BackupRow),
        (volume_id, volume): (VolumeId, &VolumeRow),
        attached: &Attached,
        cancel: &CancellationToken,
    ) -> Result<Ran, Trouble> {
        let engine = match self.engine(request).await? {
            Ok(engine) => engine.with_volumes(attached.volumes.clone()),
            Err(problem) => return Ok(Ran::Failed(problem)),
        };
        if let Err(problem) = self.take_in(&engine, id).await? {
            return Ok(Ran::Failed(problem));
        }
        let meta = match engine.volume_meta(id).await {
            Ok(meta) => meta,
            Err(error) => return Ok(Ran::Failed(lasting(error)?)),
        };
        let job_id = job_id(request);
        let context = &request.context;
        // Before anything is written: the token of the user may not be good for as long as that takes.
        let rekeyed = match self.rekey(context, job_id, row, volume, meta.as_deref()).await? {
            Ok(rekeyed) => rekeyed,
            Err(problem) => return Ok(Ran::Failed(problem)),
        };
        let work =
            RestoreWork { backup_id: id, target: attached.location.clone(), volume_id: Some(volume_id) };
        let job = Job { id: job_id, store: None, deadline: None, work: Work::Restore(work) };
        let progress = Progress { worker: self, request, id, action: RESTORE };
        let mut ran = self.run(&engine, &job, cancel, BEING_RESTORED, &progress).await?;
        if let (Ran::Succeeded, Some(meta)) = (&ran, &meta) {
            match self.database.restore_volume_meta(&volume.id, meta, &rekeyed.changes).await {
                Ok(()) => {}
                Err(error) if error.class() == Class::Transient => return Err(error.into()),
                Err(error) => ran = Ran::Failed(Problem::new(error.class(), &error)),
            }
        }
        self.drop_key(context, rekeyed, matches!(ran, Ran::Succeeded)).await?;
        Ok(ran)
    }

    /// Removes a backup.
    pub(super) async fn delete_backup(&self, incoming: &Incoming) -> Result<Value, Trouble> {
        let id = oslo::Backup::read(incoming.request.arg("backup")?)?.id;
        self.delete(&incoming.request, id, incoming.redelivered).await
    }

    /// Removes a backup; `redelivered` says that somebody may have done it before.
    pub(super) async fn delete(
        &self,
        request: &Request,
        id: BackupId,
        redelivered: bool,
    ) -> Result<Value, Trouble> {
        let used = self.use_of(id);
        if self.row(id).await?.status == "deleting" {
            // Whatever is done with it must end first.
            used.cancel.cancel();
        }
        let _turn = used.turn.lock().await;
        let row = self.row(id).await?;
        if row.deleted || row.status != "deleting" {
            info!(backup = %id, status = row.status, "not to be deleted any more");
            if redelivered && row.deleted {
                self.tell_end(request, id, DELETE).await;
            }
            return Ok(Value::Null);
        }
        self.tell_start(request, id, DELETE).await;
        if !self.driver.made(row.service.as_deref()) {
            let reason = format!("Delete backup aborted, {}", self.not_ours(&row));
            return self.fail_delete(request, id, &reason).await;
        }
        if let Err(problem) = self.check_key(&row) {
            return self.fail_delete(request, id, &problem.to_string()).await;
        }
        // Nobody had taken it on where it has no service.
        if row.service.is_some() {
            let removed = match self.engine(request).await? {
                Ok(engine) => self.remove(&engine, id, job_id(request)).await?,
                Err(problem) => Ran::Failed(problem),
            };
            match removed {
                Ran::Succeeded => {}
                Ran::Failed(problem) => return self.fail_delete(request, id, &problem.to_string()).await,
                Ran::Cancelled => return Err(Trouble::HandedBack),
            }
        }
        if let Err(problem) = self.delete_key(&request.context, &row).await? {
            return self.fail_delete(request, id, &problem.to_string()).await;
        }
        let default = &self.conf.default;
        let refresh = QuotaRefresh {
            until_refresh: default.until_refresh,
            max_age_seconds: default.max_age,
            reservation_seconds: default.reservation_expire,
        };
        self.database.delete_backup(&row.id, &refresh).await?;
        info!(backup = %id, "backup deleted");
        self.tell_end(request, id, DELETE).await;
        Ok(Value::Null)
    }

    /// Gives the record by which a backup can be taken in elsewhere.
    pub(super) async fn export_record(&self, request: &Request) -> Result<Value, Trouble> {
        let id = oslo::Backup::read(request.arg("backup")?)?.id;
        let row = self.row(id).await?;
        let refuse = |reason: &str| Err(Trouble::Failure(Failure::invalid_backup(reason)));
        if row.status != "available" {
            let status = row.status;
            return refuse(&format!(
                "Export backup aborted, expected backup status available but got {status}."
            ));
        }
        if !self.driver.made(row.service.as_deref()) {
            return refuse(&format!("Export record aborted, {}", self.not_ours(&row)));
        }
        let fields = self.database.backup_columns(&row.id).await?.unwrap_or_default();
        let export = export_record::of_row(row.service.unwrap_or_default(), fields);
        Ok(json!({ "backup_service": export.backup_service, "backup_url": export.backup_url }))
    }

    /// Takes in a backup by the record that another Cinder, or this one, has exported.
    pub(super) async fn import_record(&self, request: &Request) -> Result<Value, Trouble> {
        let id = oslo::Backup::read(request.arg("backup")?)?.id;
        let (service, url) = (request.text("backup_service")?, request.text("backup_url")?);
        if !self.driver.made(Some(service)) {
            return self.pass_on_import(request, id, service).await;
        }
        let fields = match export_record::fields_of(url) {
            Ok(fields) => fields,
            Err(error) => {
                let reason = Causes(&error).to_string();
                return self.fail_import(id, &reason).await;
            }
        };
        // What follows is refused in Cinder's words, by which others know it.
        let missing = export_record::missing_in(&fields);
        if !missing.is_empty() {
            let reason = format!(
                "Driver successfully decoded imported backup data, but there are missing fields ({}).",
                missing.join(", ")
            );
            return self.fail_import(id, &reason).await;
        }
        let from = fields.get("id").and_then(Value::as_str).unwrap_or_default();
        if from != id.to_string() {
            let reason = format!("Trying to import backup metadata from id {from} into backup {id}.");
            return self.fail_import(id, &reason).await;
        }
        let changes = Changes::new()
            .text("service", self.driver.class())
            .text("availability_zone", &self.capabilities.availability_zone)
            .text("host", &self.host);
        match self.database.import_backup(&id.to_string(), &fields, &changes).await {
            Ok(true) => info!(backup = %id, "record of a backup taken in"),
            Ok(false) => info!(backup = %id, "no record is awaited any more"),
            Err(error) if error.class() == Class::Transient => return Err(error.into()),
            Err(error) => return self.fail_import(id, &error.to_string()).await,
        }
        Ok(Value::Null)
    }

    /// Has the next of the hosts try that may know the driver.
    async fn pass_on_import(&self, request: &Request, id: BackupId, service: &str) -> Result<Value, Trouble> {
        let mut hosts = request.arg("backup_hosts")?.as_array().cloned().unwrap_or_default();
        let Some(host) = hosts.pop().as_ref().and_then(Value::as_str).map(str::to_owned) else {
            let reason = format!(
                "Import record failed, cannot find backup service to perform the import. Request service {service}."
            );
            return self.fail_import(id, &reason).await;
        };
        let mut args = request.args.clone();
        args.insert("backup_hosts".into(), Value::Array(hosts));
        let request = Request::new(request.context.clone(), "import_record", request.version.clone(), args);
        match self.rpc.cast(&Target::on(TOPIC, host), &request).await {
            Ok(()) => Ok(Value::Null),
            Err(error) => {
                let reason = Causes(&error).to_string();
                self.fail_import(id, &reason).await
            }
        }
    }

    async fn fail_import(&self, id: BackupId, reason: &str) -> Result<Value, Trouble> {
        let changes = Changes::new().text("status", "error").text("fail_reason", reason);
        self.database.change_backup(&id.to_string(), &["creating"], &changes).await?;
        Err(Trouble::Failure(Failure::invalid_backup(reason)))
    }

    /// Gives a backup another status because a person says so.
    pub(super) async fn reset_status(&self, request: &Request) -> Result<Value, Trouble> {
        let id = oslo::Backup::read(request.arg("backup")?)?.id;
        let status = request.text("status")?;
        let row = self.row(id).await?;
        if !self.driver.made(row.service.as_deref()) {
            let reason = format!("Reset backup status aborted, {}", self.not_ours(&row));
            return Err(Trouble::Failure(Failure::invalid_backup(&reason)));
        }
        if row.service.is_some() && !row.deleted {
            self.database.change_backup(&row.id, &[], &Changes::new().text("status", status)).await?;
            info!(backup = %id, status, "status of the backup set");
            self.tell(request, id, "reset_status.end").await;
            let used = self.use_of(id);
            // Whoever is at it removes it when he has ended.
            if status == "error"
                && let Ok(_turn) = used.turn.try_lock()
            {
                self.remove_temporary(&request.context, &self.row(id).await?).await?;
            }
        }
        Ok(Value::Null)
    }

    /// Has the volume service remove what it has made of a volume for this backup alone. What cannot be asked for now is asked
    /// for at the next start, if the backup has failed.
    pub(super) async fn remove_temporary(
        &self,
        context: &oslo::Context,
        row: &BackupRow,
    ) -> Result<(), database::Error> {
        if let Some(id) = &row.temp_volume_id {
            if let (Some(volume), Some(columns)) =
                (self.database.volume(id).await?, self.database.volume_columns(id).await?)
            {
                let asked = match self.volume_service(&volume, context) {
                    Ok(volumes) => volumes.delete_volume(&object_of(columns)).await.map_err(|e| problem(&e)),
                    Err(homeless) => Err(homeless),
                };
                if let Err(error) = asked {
                    warn!(volume = id, %error, "the volume that was made for the backup stays");
                    return Ok(());
                }
            }
            let changes = Changes::new().text_or_null("temp_volume_id", None);
            self.database.change_backup(&row.id, &[], &changes).await?;
        }
        if let Some(id) = &row.temp_snapshot_id {
            if let Some(snapshot) = self.database.snapshot(id).await?
                && let Some(volume) = self.database.volume(&snapshot.volume_id).await?
            {
                let deleting = Changes::new().text("status", "deleting");
                self.database.change_snapshot(id, &[], &deleting).await?;
                let columns = self.database.snapshot_columns(id).await?.unwrap_or_default();
                let asked = match self.volume_service(&volume, context) {
                    Ok(volumes) => {
                        volumes.delete_snapshot(&snapshot_object_of(columns)).await.map_err(|e| problem(&e))
                    }
                    Err(homeless) => Err(homeless),
                };
                if let Err(error) = asked {
                    warn!(snapshot = id, %error, "the snapshot that was made for the backup stays");
                    return Ok(());
                }
            }
            let changes = Changes::new().text_or_null("temp_snapshot_id", None);
            self.database.change_backup(&row.id, &[], &changes).await?;
        }
        Ok(())
    }

    /// The row of a backup, even of one that is deleted.
    async fn row(&self, id: BackupId) -> Result<BackupRow, Trouble> {
        let row = self.database.backup_even_if_deleted(&id.to_string()).await?;
        row.ok_or_else(|| {
            let message = format!("Backup {id} could not be found.");
            Trouble::Failure(Failure::cinder("BackupNotFound", message, 404))
        })
    }

    /// Whether a backup is still to be made.
    async fn is_awaited(&self, row: &BackupRow) -> Result<bool, database::Error> {
        if row.status == "creating" {
            return Ok(true);
        }
        if !row.awaits_end() {
            return Ok(false);
        }
        // It may be one that was made, and has nothing that its row must say.
        let status = match &row.snapshot_id {
            Some(id) => self.database.snapshot(id).await?.map(|found| found.status),
            None => self.database.volume(&row.volume_id).await?.map(|found| found.status),
        };
        Ok(status.as_deref() == Some("backing-up"))
    }

    /// Whether nobody uses a volume, as far as Cinder knows.
    async fn is_free(&self, id: VolumeId) -> Result<bool, database::Error> {
        let columns = self.database.volume_columns(&id.to_string()).await?.unwrap_or_default();
        Ok(columns.get("attach_status").and_then(Value::as_str) == Some("detached"))
    }

    /// The service that has a volume, without its pool.
    fn volume_service<'a>(
        &'a self,
        volume: &'a VolumeRow,
        context: &'a oslo::Context,
    ) -> Result<VolumeService<'a>, Problem> {
        let (Some(host), Ok(id)) = (service_of(volume), volume.id.parse()) else {
            let message = format!("Volume {} is on no host.", volume.id);
            return Err(Problem { class: Class::Permanent, message, causes: Vec::new() });
        };
        Ok(VolumeService::new(&self.rpc, host, context, id, self.reply_time_max()))
    }

    async fn fail_backup(
        &self,
        request: &Request,
        id: BackupId,
        detail: Detail,
        reason: &str,
    ) -> Result<Value, Trouble> {
        if self.database.fail_backup(&id.to_string(), reason).await? {
            self.tell_error(request, id, CREATE, reason).await;
        }
        self.tell_user(request, ("VOLUME_BACKUP", &id.to_string()), CREATE, detail).await;
        Err(Trouble::Failure(Failure::invalid_backup(reason)))
    }

    async fn fail_restore(
        &self,
        request: &Request,
        (id, volume_id): (BackupId, VolumeId),
        restored: Restored,
        detail: Detail,
        reason: &str,
    ) -> Result<Value, Trouble> {
        self.database.finish_restore(&id.to_string(), &volume_id.to_string(), restored).await?;
        self.tell_error(request, id, RESTORE, reason).await;
        self.tell_user(request, ("VOLUME_BACKUP", &id.to_string()), RESTORE, detail).await;
        Err(Trouble::Failure(Failure::invalid_backup(&format!("Restore backup aborted: {reason}"))))
    }

    async fn fail_delete(&self, request: &Request, id: BackupId, reason: &str) -> Result<Value, Trouble> {
        let changes = Changes::new().text("status", "error").text("fail_reason", reason);
        if self.database.change_backup(&id.to_string(), &["deleting"], &changes).await? {
            self.tell_error(request, id, DELETE, reason).await;
        }
        self.tell_user(request, ("VOLUME_BACKUP", &id.to_string()), DELETE, Detail::Delete).await;
        Err(Trouble::Failure(Failure::invalid_backup(reason)))
    }

    fn not_ours(&self, row: &BackupRow) -> String {
        format!(
            "the backup service currently configured [{}] is not the backup service that was used to create this backup [{}].",
            self.driver.class(),
            row.service.as_deref().unwrap_or_default()
        )
    }

    /// Leaves a message for whoever asked, about a resource, by its kind and its id; that is no reason for anything to fail.
    async fn tell_user(
        &self,
        request: &Request,
        (resource_type, resource_id): (&str, &str),
        action: Action,
        detail: Detail,
    ) {
        let message = UserMessage {
            project_id: request.context.project_id().unwrap_or_default(),
            request_id: request.context.request_id(),
            level: detail.level(),
            resource_type,
            resource_id,
            action_id: action.id,
            detail_id: detail.id(),
            ttl_seconds: self.conf.default.message_ttl,
        };
        if let Err(error) = self.database.add_message(&message).await {
            warn!(error = %Causes(&error), "the user could not be left a message");
        }
    }

    /// Waits for a turn among the backups and restores; none if what it is for is `unwanted` first.
    async fn place(
        &self,
        row: &BackupRow,
        unwanted: impl Future<Output = ()>,
    ) -> Result<Option<Place>, Trouble> {
        tokio::select! {
            place = self.places.take(row.project_id.clone(), Timestamp::now()) => match place {
                Some(place) => Ok(Some(place)),
                None => Err(Trouble::HandedBack),
            },
            () = unwanted => Ok(None),
            () = self.hand_back.cancelled() => Err(Trouble::HandedBack),
        }
    }

    fn reply_time_max(&self) -> Duration {
        Duration::from_secs(self.conf.default.rpc_response_timeout)
    }
}

/// The name of the service that has a volume: its cluster, or its host, without the pool.
pub(super) fn service_of(volume: &VolumeRow) -> Option<&str> {
    let names = [&volume.cluster_name, &volume.host];
    names.into_iter().flatten().find(|name| !name.is_empty())?.split('#').next()
}

/// What a backup may be while it is made. Whoever sets it to `available`, as `cinder backup-reset-state` does if nothing else
/// is said, does not want its end, and a backup that is given out as whole must become so.
const BEING_MADE: &[&str] = &["creating", "available", "restoring"];
/// What it is while it is restored.
const BEING_RESTORED: &[&str] = &["restoring"];
/// What a volume is that waits for a backup to be put onto it.
const AWAITING: [&str; 2] = ["restoring-backup", "creating"];

/// Takes out of the row of a backup what a job must know, if all of it can be used.
fn work_of(row: &BackupRow) -> Result<(VolumeId, Option<BackupId>, Option<crate::job::Container>), Problem> {
    let volume_id = row.volume_id.parse().map_err(|error| problem(&error))?;
    let parent_id = row.parent_id.as_deref().map(str::parse).transpose().map_err(|error| problem(&error))?;
    let container = row.container.as_deref().map(str::parse).transpose().map_err(|error| problem(&error))?;
    Ok((volume_id, parent_id, container))
}

fn problem(error: &(dyn std::error::Error + 'static)) -> Problem {
    Problem::new(Class::Permanent, error)
}

/// The same message again is the same job again.
fn job_id(request: &Request) -> JobId {
    let id = request.unique_id.as_deref().and_then(|id| Uuid::try_parse(id).ok());
    id.and_then(|id| id.to_string().parse().ok()).unwrap_or_else(JobId::random)
}

/// The context of what follows from a request, which says as well what it is done for.
fn context_of(request: &Request, id: BackupId, action: Action) -> oslo::Context {
    let mut context = request.context.clone();
    context.set("message_resource_id", json!(id));
    context.set("message_resource_type", json!("VOLUME_BACKUP"));
    context.set("message_action", json!([action.id, action.name]));
    context
}
