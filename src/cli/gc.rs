//! What jobs that died have left in a store: shown, and removed where that was asked for.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::SignedDuration;
use serde::Serialize;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use super::{Error, FAILED, engine_of, print_json, render, say};
use crate::broker::{Broker, Subscription};
use crate::config::Config;
use crate::engine::{Engine, Found, Garbage};
use crate::job::{JobId, StoreName};
use crate::message::{self, Control};
use crate::worker::{self, Stores};

/// How long workers may take to say which jobs they run.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// How long the broker may take until we hear what workers say.
const HEARD_MAX: Duration = Duration::from_secs(30);
/// How long after a question that was not heard the next one is asked.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How much is removed between two looks at what workers run.
const REMOVED_AT_ONCE: usize = 100;

/// Something that nobody needs, for people and programs.
#[derive(Debug, Serialize)]
pub struct Swept {
    /// What it is.
    #[serde(flatten)]
    pub garbage: Garbage,
    /// Whether it was removed; absent if that was not tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub removed: Option<bool>,
    /// Why it could not be removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Looks for what nobody needs in a store, and removes it if that is wanted.
pub(super) async fn run(
    config: &Config,
    store: Option<StoreName>,
    older_than: SignedDuration,
    yes: bool,
    json: bool,
) -> Result<u8, Error> {
    let stores = Stores::open(config)?;
    let engine = engine_of(config, &stores, store.as_ref()).await?;
    let mut workers = Workers::of(config).await?;
    let Found { garbage, problems } = engine.garbage(older_than).await?;
    let mut swept = Vec::new();
    for garbage in garbage.chunks(REMOVED_AT_ONCE) {
        let running = workers.running(garbage.iter().filter_map(|garbage| garbage.job_id).collect()).await?;
        for garbage in garbage.iter().filter(|garbage| garbage.job_id.is_none_or(|id| !running.contains(&id)))
        {
            swept.push(if yes { sweep(engine, garbage).await } else { Swept::only_found(garbage) });
        }
    }
    workers.leave().await;

    if json {
        print_json(&swept)?;
    } else if swept.is_empty() {
        say("nothing is left over");
    } else {
        say(render::garbage(&swept).trim_end());
        let store = store.map_or_else(String::new, |name| format!(" --store {name}"));
        match yes {
            true => say(format_args!("{} in all", render::garbage_total(&swept))),
            false => say(format_args!(
                "{}: `backhaul gc{store} --yes` removes them",
                render::garbage_total(&swept)
            )),
        }
    }
    for error in &problems {
        eprintln!("error: {}", render::error(error));
    }
    let failed = !problems.is_empty() || swept.iter().any(|swept| swept.error.is_some());
    Ok(if failed { FAILED } else { 0 })
}

async fn sweep(engine: &Engine, garbage: &Garbage) -> Swept {
    match engine.remove_garbage(garbage).await {
        Ok(removed) => Swept { removed: Some(removed), ..Swept::only_found(garbage) },
        Err(error) => {
            let error = Some(render::error(&error));
            Swept { removed: Some(false), error, ..Swept::only_found(garbage) }
        }
    }
}

impl Swept {
    fn only_found(garbage: &Garbage) -> Self {
        Self { garbage: garbage.clone(), removed: None, error: None }
    }
}

/// The workers of the broker, if there is one: without one none has jobs.
struct Workers {
    /// Who we are to them.
    id: String,
    broker: Option<(Broker, Subscription)>,
}

impl Workers {
    /// Reaches them. That the broker is away is an error: who does not answer may run any job.
    async fn of(config: &Config) -> Result<Self, Error> {
        let id = Uuid::new_v4().to_string();
        if config.broker.is_none() {
            return Ok(Self { id, broker: None });
        }
        let broker = Broker::connect(worker::broker_settings(config, "gc")?).await?;
        let answers = broker.control();
        Ok(Self { id, broker: Some((broker, answers)) })
    }

    /// Which of these jobs a worker runs now.
    async fn running(&mut self, mut jobs: BTreeSet<JobId>) -> Result<BTreeSet<JobId>, Error> {
        let mut running = BTreeSet::new();
        let Some((broker, answers)) = self.broker.as_mut().filter(|_| !jobs.is_empty()) else {
            return Ok(running);
        };
        let question = |job_id| message::encode_control(Control::WhoRuns { job_id, worker: self.id.clone() });
        let heard = async |answers: &mut Subscription| {
            let notice = answers.next().await;
            let Some(notice) = notice else { return Err(Error::Nowhere("the broker is gone")) };
            Ok(message::parse_control(&notice.body).ok())
        };
        // We hear our own questions: whoever heard this one hears the answers to those that follow.
        let probe = JobId::random();
        let begun = Instant::now();
        loop {
            broker.publish_control(question(probe).into(), worker::command_properties()).await?;
            let own = async {
                loop {
                    if let Some(Control::WhoRuns { job_id, .. }) = heard(answers).await?
                        && job_id == probe
                    {
                        return Ok::<_, Error>(());
                    }
                }
            };
            if let Ok(own) = timeout(ASK_AGAIN, own).await {
                own?;
                break;
            }
            if begun.elapsed() > HEARD_MAX {
                return Err(Error::Nowhere("the broker does not pass on what workers are asked"));
            }
        }
        for job_id in &jobs {
            broker.publish_control(question(*job_id).into(), worker::command_properties()).await?;
        }
        let end = Instant::now() + ANSWER_MAX;
        while let Ok(control) = timeout_at(end, heard(answers)).await {
            if let Some(Control::Runs { job_id, .. }) = control?
                && jobs.remove(&job_id)
            {
                running.insert(job_id);
            }
        }
        Ok(running)
    }

    async fn leave(self) {
        if let Some((broker, answers)) = self.broker {
            drop(answers);
            broker.close().await;
        }
    }
}
