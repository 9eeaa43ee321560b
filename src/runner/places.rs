//! Places: how many jobs run at once, and whose is the next one.
//!
//! A place that is free goes to the project that has the fewest jobs at work, and of its jobs to the one that came first. So
//! whoever sends a thousand jobs keeps nobody else waiting for them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// How long one more than may wait is kept all the same: a place that becomes free meanwhile makes room.
const CROWDED_TIME_MAX: Duration = Duration::from_millis(50);

/// The places of a worker.
#[derive(Debug)]
pub struct Places {
    state: Mutex<State>,
    changed: Notify,
    waiting_max: usize,
    wait_time_max: Duration,
}

#[derive(Debug, Default)]
struct State {
    free_count: usize,
    /// How many jobs of each project run; those that name none are one project.
    running: HashMap<Option<String>, usize>,
    waiting: Vec<Waiting>,
    /// Since when more wait than may.
    crowded_since: Option<Instant>,
    last_number: u64,
    closed: bool,
}

/// A job that waits for a place.
#[derive(Debug, Clone)]
struct Waiting {
    project: Option<String>,
    since: Timestamp,
    /// Tells it from others that came at the same time.
    number: u64,
}

impl State {
    fn running_count(&self, project: &Option<String>) -> usize {
        self.running.get(project).copied().unwrap_or(0)
    }

    /// Whose a free place is.
    fn next(&self) -> Option<u64> {
        let rank = |job: &&Waiting| (self.running_count(&job.project), job.since, job.number);
        self.waiting.iter().min_by_key(rank).map(|job| job.number)
    }

    /// Who makes room for others: of the project that has the most jobs here the one that came last.
    fn last(&self) -> Option<u64> {
        let waiting_count =
            |project: &Option<String>| self.waiting.iter().filter(|job| job.project == *project).count();
        let rank = |job: &&Waiting| {
            (self.running_count(&job.project) + waiting_count(&job.project), job.since, job.number)
        };
        self.waiting.iter().max_by_key(rank).map(|job| job.number)
    }
}

/// What is to become of a job that waits.
enum Turn {
    Take,
    GiveUp,
    /// To look again at that time, or when something has changed.
    Wait(Instant),
}

impl Places {
    /// So many places, for which up to `waiting_max` jobs wait for up to `wait_time_max`.
    pub fn new(count: usize, waiting_max: usize, wait_time_max: Duration) -> Arc<Self> {
        let state = State { free_count: count, ..State::default() };
        Arc::new(Self { state: Mutex::new(state), changed: Notify::new(), waiting_max, wait_time_max })
    }

    /// Waits for a place for a job that came at that time. None if it is to make room for others, has waited for too long, or
    /// no place is given any more: then it is to come again later.
    pub async fn take(self: &Arc<Self>, project: Option<String>, since: Timestamp) -> Option<Place> {
        let until = Instant::now() + self.wait_time_max;
        let waits = self.enter(project, since);
        loop {
            let changed = self.changed.notified();
            let look_at = match self.turn(waits.number, until) {
                Turn::Take => return Some(Place { places: self.clone(), project: waits.project.clone() }),
                Turn::GiveUp => return None,
                Turn::Wait(look_at) => look_at,
            };
            tokio::select! {
                () = changed => {}
                () = sleep_until(look_at) => {}
            }
        }
    }

    /// Gives no more places.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_waiters();
    }

    fn enter(self: &Arc<Self>, project: Option<String>, since: Timestamp) -> Waits {
        let mut state = self.state();
        state.last_number += 1;
        let number = state.last_number;
        state.waiting.push(Waiting { project: project.clone(), since, number });
        if state.waiting.len() > self.waiting_max {
            state.crowded_since.get_or_insert_with(Instant::now);
        }
        drop(state);
        self.changed.notify_waiters();
        Waits { places: self.clone(), project, number }
    }

    fn turn(&self, number: u64, until: Instant) -> Turn {
        let mut state = self.state();
        if state.closed {
            return Turn::GiveUp;
        }
        if state.free_count > 0 && state.next() == Some(number) {
            state.free_count -= 1;
            let job = state.waiting.iter().find(|job| job.number == number).cloned();
            if let Some(job) = job {
                *state.running.entry(job.project).or_default() += 1;
            }
            return Turn::Take;
        }
        let mut look_at = until;
        if let Some(since) = state.crowded_since
            && state.last() == Some(number)
        {
            look_at = look_at.min(since + CROWDED_TIME_MAX);
        }
        if look_at <= Instant::now() { Turn::GiveUp } else { Turn::Wait(look_at) }
    }

    fn leave(&self, number: u64) {
        let mut state = self.state();
        state.waiting.retain(|job| job.number != number);
        if state.waiting.len() <= self.waiting_max {
            state.crowded_since = None;
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds a job among those that wait.
struct Waits {
    places: Arc<Places>,
    project: Option<String>,
    number: u64,
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.places.leave(self.number);
    }
}

/// A place that a job has until this is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    project: Option<String>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.state();
        state.free_count += 1;
        if let Some(count) = state.running.get_mut(&self.project) {
            *count -= 1;
            if *count == 0 {
                state.running.remove(&self.project);
            }
        }
        drop(state);
        self.places.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    /// Has a job ask for a place, and lets it come as far as it can.
    async fn ask(places: &Arc<Places>, project: &str, second: i64) -> JoinHandle<Option<Place>> {
        let (places, project) = (places.clone(), Some(project.to_owned()));
        let since = Timestamp::from_second(second).unwrap();
        let asked = tokio::spawn(async move { places.take(project, since).await });
        settle().await;
        asked
    }

    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_free_place_goes_to_the_project_with_the_fewest_and_then_to_the_first() {
        let places = Places::new(2, 10, LONG);
        let first = ask(&places, "many", 1).await.await.unwrap().unwrap();
        let second = ask(&places, "many", 2).await.await.unwrap().unwrap();
        let late = ask(&places, "many", 9).await;
        let early = ask(&places, "many", 3).await;
        let other = ask(&places, "few", 10).await;
        assert!(![&late, &early, &other].iter().any(|asked| asked.is_finished()));

        drop(first);
        settle().await;
        assert!(other.is_finished() && !early.is_finished() && !late.is_finished());
        drop(second);
        settle().await;
        assert!(early.is_finished() && !late.is_finished());
        drop(other.await.unwrap().unwrap());
        settle().await;
        assert!(late.is_finished());
    }

    #[tokio::test]
    async fn of_more_than_may_wait_the_last_of_the_project_with_the_most_makes_room() {
        let places = Places::new(1, 2, LONG);
        let _first = ask(&places, "many", 1).await.await.unwrap().unwrap();
        let [early, late] = [ask(&places, "many", 2).await, ask(&places, "many", 3).await];
        let other = ask(&places, "few", 4).await;
        assert!(!late.is_finished(), "a place may become free soon");

        assert!(late.await.unwrap().is_none());

        settle().await;
        assert!(!early.is_finished() && !other.is_finished());
    }

    #[tokio::test]
    async fn a_job_that_has_waited_for_long_and_those_that_wait_at_the_end_are_to_come_again() {
        let places = Places::new(1, 2, Duration::from_millis(50));
        let first = ask(&places, "a", 1).await.await.unwrap().unwrap();
        assert!(ask(&places, "a", 2).await.await.unwrap().is_none());
        drop(first);

        let places = Places::new(1, 2, LONG);
        let first = ask(&places, "a", 1).await.await.unwrap().unwrap();
        let gone = ask(&places, "a", 2).await;
        gone.abort();
        let next = ask(&places, "a", 3).await;
        drop(first);
        let held = next.await.unwrap().expect("whoever asks no more holds nobody up");
        let waits = ask(&places, "a", 4).await;
        places.close();
        assert!(waits.await.unwrap().is_none());
        drop(held);
        assert!(ask(&places, "b", 5).await.await.unwrap().is_none());
    }
}
