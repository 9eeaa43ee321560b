//! The broker room against a real RabbitMQ.

use std::collections::BTreeSet;
use std::future::Future;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::link::Link;
use crate::support::rabbit::Rabbit;
use backhaul::broker::{
    Broker, Delivery, Error, Jobs, Notice, Outgoing, Properties, QueueKind, Routed, Settings, State,
    Subscription, Tls,
};
use backhaul::error::{Causes, Class};
use bytes::Bytes;
use jiff::Timestamp;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ExchangeDeleteOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// Longer than anything here takes when it works.
const PATIENCE: Duration = Duration::from_secs(100);

fn settings(url: &str) -> Settings {
    Settings {
        url: url.parse().unwrap(),
        prefix: format!("test-{}", uuid::Uuid::new_v4()),
        connection_name: "broker test".into(),
        heartbeat_seconds: 10,
        tls: Tls::default(),
        queue_kind: QueueKind::Quorum,
        retry_delay_seconds: 1,
        retry_delay_seconds_max: 8,
        reconnect_seconds_max: 1,
        publish_seconds_max: 100,
        message_bytes_max: 1024,
    }
}

async fn shared() -> (Broker, Settings) {
    let settings = settings(Rabbit::shared().url());
    (Broker::connect(settings.clone()).await.unwrap(), settings)
}

async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

async fn next(jobs: &mut Jobs) -> Delivery {
    soon("a delivery", jobs.next()).await.expect("the jobs have ended")
}

/// Publishes the job "a", which comes a second time.
async fn redelivered(broker: &Broker, jobs: &mut Jobs) -> Delivery {
    publish(broker, "a").await;
    next(jobs).await.requeue().await.unwrap();
    let again = next(jobs).await;
    assert!(again.redelivered);
    again
}

async fn next_notice(subscription: &mut Subscription) -> Notice {
    soon("a notice", subscription.next()).await.expect("the subscription has ended")
}

/// Nothing can prove that something never comes; this is long enough for it to come if it is on its way.
async fn assert_none(jobs: &mut Jobs) {
    if let Ok(delivery) = timeout(Duration::from_millis(700), jobs.next()).await {
        panic!("there is a delivery: {delivery:?}");
    }
}

async fn publish(broker: &Broker, body: &'static str) {
    let routed = broker.publish_job(Bytes::from_static(body.as_bytes()), Properties::default()).await;
    assert_eq!(routed.unwrap(), Routed::Queued);
}

async fn assert_queue_empty(broker: &Broker, settings: &Settings) {
    let mut jobs = broker.jobs(1, 0);
    assert_none(&mut jobs).await;
    assert_eq!(count(settings, "jobs").await, 0);
}

/// A port where nobody listens, below those that the kernel hands out by itself: it stays free.
fn free_port() -> u16 {
    let first = uuid::Uuid::new_v4().as_u128() % 8_000;
    let mut ports = (0..8_000).map(|n| 12_000 + ((first + n) % 8_000) as u16);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

/// Another client, which shares no code with ours.
async fn raw(settings: &Settings, url: &str) -> lapin::Channel {
    assert_eq!(url.parse::<backhaul::broker::AmqpUrl>().unwrap(), settings.url);
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    connection.create_channel().await.unwrap()
}

async fn count(settings: &Settings, queue: &str) -> u32 {
    let channel = raw(settings, Rabbit::shared().url()).await;
    let passive = lapin::options::QueueDeclareOptions { passive: true, ..Default::default() };
    let name = format!("{}.{queue}", settings.prefix).into();
    channel.queue_declare(name, passive, FieldTable::default()).await.unwrap().message_count()
}

fn text(body: &Bytes) -> &str {
    std::str::from_utf8(body).unwrap()
}

#[tokio::test]
async fn a_publish_is_confirmed_and_says_when_no_queue_wanted_it() {
    let (broker, _) = shared().await;
    assert_eq!(*broker.state().borrow(), State::Connected);
    publish(&broker, "a").await;

    let nowhere = broker.publish_event("backup.succeeded.-", Bytes::new(), Properties::default()).await;
    assert_eq!(nowhere.unwrap(), Routed::Nowhere);
    let nowhere = broker.publish_reply("no-such-queue", Bytes::new(), Properties::default()).await;
    assert_eq!(nowhere.unwrap(), Routed::Nowhere);
    // One of the workers keeps it, once there is one.
    let kept = broker.publish_control(Bytes::new(), Properties::default()).await;
    assert_eq!(kept.unwrap(), Routed::Queued);
}

#[tokio::test]
async fn concurrent_publishes_each_learn_their_own_fate() {
    let (broker, _) = shared().await;
    let publishes = (0..200).map(|i| {
        let broker = &broker;
        async move {
            let properties = Properties::default();
            if i % 2 == 0 {
                assert_eq!(broker.publish_job(Bytes::new(), properties).await.unwrap(), Routed::Queued);
            } else {
                let nowhere = broker.publish_reply("no-such-queue", Bytes::new(), properties).await;
                assert_eq!(nowhere.unwrap(), Routed::Nowhere);
            }
        }
    });
    futures_util::future::join_all(publishes).await;
}

#[tokio::test]
async fn a_publish_that_was_given_up_leaves_nothing_behind_for_the_next() {
    let (broker, _) = shared().await;
    for _ in 0..20 {
        let dropped = broker.publish_reply("no-such-queue", Bytes::new(), Properties::default());
        let _ = timeout(Duration::from_micros(300), dropped).await;
        publish(&broker, "a").await;
    }
}

#[tokio::test]
async fn what_the_broker_refuses_is_an_error_at_once_and_the_next_publish_works() {
    let (broker, _) = shared().await;
    let outgoing = Outgoing {
        exchange: "no-such-exchange".into(),
        routing_key: String::new(),
        body: Bytes::new(),
        properties: Properties::default(),
    };
    let error = broker.publish(outgoing).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.to_string().contains("no-such-exchange"), "{error}");

    let properties = Properties { correlation_id: Some("x".repeat(256)), ..Properties::default() };
    let error = broker.publish_job(Bytes::new(), properties).await.unwrap_err();
    assert!(matches!(error, Error::TooLong { .. }), "{error:?}");

    publish(&broker, "a").await;
}

#[tokio::test]
async fn a_job_arrives_with_its_body_and_properties() {
    let (broker, settings) = shared().await;
    let properties = Properties {
        content_type: Some("application/json".into()),
        correlation_id: Some("c".into()),
        reply_to: Some("r".into()),
        message_id: Some("m".into()),
        priority: Some(7),
        attempt: 3,
        ..Properties::default()
    };
    broker.publish_job(Bytes::from_static(b"\0body\xff"), properties.clone()).await.unwrap();

    let mut jobs = broker.jobs(1, 0);
    let delivery = next(&mut jobs).await;
    assert_eq!(&delivery.body[..], b"\0body\xff");
    assert_eq!(delivery.properties, properties);
    assert!(!delivery.redelivered);
    assert!(!delivery.oversize);
    delivery.ack().await.unwrap();
    drop(jobs);
    assert_queue_empty(&broker, &settings).await;
}

#[tokio::test]
async fn a_body_that_is_too_large_is_marked() {
    let (broker, settings) = shared().await;
    let mut jobs = broker.jobs(1, 0);
    for (bytes, oversize) in
        [(settings.message_bytes_max, false), (settings.message_bytes_max + 1, true), (300_000, true)]
    {
        broker.publish_job(vec![7; bytes].into(), Properties::default()).await.unwrap();
        let delivery = next(&mut jobs).await;
        assert_eq!((delivery.body.len(), delivery.oversize), (bytes, oversize));
        delivery.dead_letter("too large").await.unwrap();
    }
}

#[tokio::test]
async fn each_slot_has_one_delivery_until_that_is_settled_or_dropped() {
    let (broker, settings) = shared().await;
    for body in ["1", "2", "3", "4"] {
        publish(&broker, body).await;
    }
    let mut jobs = broker.jobs(2, 0);
    let first = next(&mut jobs).await;
    let second = next(&mut jobs).await;
    let bodies = BTreeSet::from([text(&first.body).to_string(), text(&second.body).to_string()]);
    assert_eq!(bodies, BTreeSet::from(["1".into(), "2".into()]));
    assert_none(&mut jobs).await;

    first.ack().await.unwrap();
    let third = next(&mut jobs).await;
    assert_eq!(text(&third.body), "3");
    assert_none(&mut jobs).await;

    second.ack().await.unwrap();
    let fourth = next(&mut jobs).await;
    assert_eq!(text(&fourth.body), "4");
    drop(fourth);
    let again = next(&mut jobs).await;
    assert_eq!(text(&again.body), "4");
    assert!(again.redelivered);

    again.ack().await.unwrap();
    third.ack().await.unwrap();
    drop(jobs);
    assert_queue_empty(&broker, &settings).await;
}

#[tokio::test]
async fn a_channel_that_the_broker_closes_takes_no_other_jobs_delivery_with_it() {
    let (broker, settings) = shared().await;
    for body in ["1", "2"] {
        publish(&broker, body).await;
    }
    let mut jobs = broker.jobs(2, 0);
    let first = next(&mut jobs).await;
    let second = next(&mut jobs).await;
    let body = first.body.clone();
    // Who publishes to an exchange that is not there has its channel closed.
    let dead = format!("{}.dead", settings.prefix).into();
    let channel = raw(&settings, Rabbit::shared().url()).await;
    channel.exchange_delete(dead, ExchangeDeleteOptions::default()).await.unwrap();

    let error = first.dead_letter("bad").await.unwrap_err();

    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    let again = next(&mut jobs).await;
    assert!(again.redelivered && again.body == body, "{again:?}");
    assert!(timeout(Duration::ZERO, second.lost()).await.is_err(), "the other one goes on");
    second.ack().await.unwrap();
    again.ack().await.unwrap();
    drop(jobs);
    assert_queue_empty(&broker, &settings).await;
}

#[tokio::test]
async fn a_delivery_that_comes_before_the_last_ones_ack_is_known_to_be_heard_is_not_given_back() {
    let settings = Settings { queue_kind: QueueKind::Classic, ..settings(Rabbit::shared().url()) };
    let broker = Broker::connect(settings.clone()).await.unwrap();
    for _ in 0..500 {
        publish(&broker, "a").await;
    }

    let mut jobs = broker.jobs(1, 0);
    for _ in 0..500 {
        let delivery = next(&mut jobs).await;
        assert!(!delivery.redelivered);
        delivery.ack().await.unwrap();
    }
    assert_none(&mut jobs).await;
}

#[tokio::test]
async fn a_requeued_job_comes_again_as_redelivered() {
    let (broker, _) = shared().await;
    let mut jobs = broker.jobs(1, 0);
    let again = redelivered(&broker, &mut jobs).await;
    assert_eq!(again.properties.attempt, 1);
    again.ack().await.unwrap();
    assert_none(&mut jobs).await;
}

#[tokio::test]
async fn a_job_that_is_put_off_comes_back_later_as_it_was_with_its_attempt_counted() {
    let (broker, settings) = shared().await;
    let channel = raw(&settings, Rabbit::shared().url()).await;
    let mut headers = FieldTable::default();
    headers.insert("theirs".into(), AMQPValue::LongString("kept".into()));
    headers.insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("other".into())].into()));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_content_type("text/plain".into())
        .with_content_encoding("utf-8".into())
        .with_correlation_id("c".into())
        .with_reply_to("r".into())
        .with_message_id("m".into())
        .with_type("t".into())
        .with_app_id("a".into())
        .with_user_id("guest".into())
        .with_expiration("60000".into())
        .with_timestamp(1_700_000_000)
        .with_priority(5);
    let exchange = format!("{}.jobs", settings.prefix);
    channel
        .basic_publish(
            exchange.as_str().into(),
            "job".into(),
            BasicPublishOptions::default(),
            b"body",
            properties,
        )
        .await
        .unwrap()
        .await
        .unwrap();

    let mut jobs = broker.jobs(1, 0);
    let mut first = None;
    for attempt in 1..=3 {
        let delivery = next(&mut jobs).await;
        assert_eq!(delivery.properties.attempt, attempt);
        assert_eq!(text(&delivery.body), "body");
        let first = first.get_or_insert(delivery.properties.clone());
        assert_eq!(Properties { attempt: 1, story: None, ..delivery.properties.clone() }, *first);
        delivery.retry_later("").await.unwrap();
    }
    next(&mut jobs).await.requeue().await.unwrap();
    jobs.stop();

    // The other client sees all that it sent, and none of what makes the broker refuse or misroute a copy.
    let queue = || exchange.as_str().into();
    let seen = soon("the message", async {
        loop {
            if let Some(got) = channel.basic_get(queue(), BasicGetOptions::default()).await.unwrap() {
                return got;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    seen.ack(BasicAckOptions::default()).await.unwrap();
    let properties = &seen.properties;
    assert_eq!(properties.content_encoding().as_ref().unwrap().as_str(), "utf-8");
    assert_eq!(properties.kind().as_ref().unwrap().as_str(), "t");
    assert_eq!(properties.app_id().as_ref().unwrap().as_str(), "a");
    assert_eq!(*properties.timestamp(), Some(1_700_000_000));
    assert_eq!(*properties.priority(), Some(5));
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(*properties.user_id(), None);
    assert_eq!(*properties.expiration(), None);
    let headers = properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers["theirs"], AMQPValue::LongString("kept".into()));
    assert!(!headers.contains_key("CC"));
}

#[tokio::test]
async fn nobody_waits_for_the_delay_of_a_job_that_is_put_off() {
    let settings = Settings { retry_delay_seconds: 3600, ..settings(Rabbit::shared().url()) };
    let broker = Broker::connect(settings.clone()).await.unwrap();
    publish(&broker, "a").await;
    let mut jobs = broker.jobs(1, 0);
    soon("the end of it", next(&mut jobs).await.retry_later("")).await.unwrap();
    publish(&broker, "b").await;
    let other = next(&mut jobs).await;
    assert_eq!(text(&other.body), "b");
    other.ack().await.unwrap();
    drop(jobs);
    assert_queue_empty(&broker, &settings).await;
}

#[tokio::test]
async fn a_turn_is_had_by_one_connection_and_goes_with_it() {
    let (first, settings) = shared().await;
    let second = Broker::connect(settings).await.unwrap();
    let turn = first.turn("volume.a").await.unwrap().expect("nobody has it");
    assert!(second.turn("volume.a").await.unwrap().is_none(), "one has it");
    assert!(second.turn("volume.b").await.unwrap().is_some(), "that is another one");

    turn.end().await;
    let turn = second.turn("volume.a").await.unwrap().expect("it was ended");
    assert!(first.turn("volume.a").await.unwrap().is_none(), "the other one has it");

    second.close().await;
    soon("the turn of a connection that is gone", freed(&first)).await;
    drop(turn);
}

/// Takes the turn as soon as it is free, and ends it.
async fn freed(broker: &Broker) {
    loop {
        if let Some(turn) = broker.turn("volume.a").await.unwrap() {
            return turn.end().await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The task of its job had panicked.
#[tokio::test]
async fn a_turn_that_nobody_ended_is_not_kept_from_others_as_long_as_the_connection_lasts() {
    let (first, settings) = shared().await;
    let second = Broker::connect(settings).await.unwrap();
    let turn = first.turn("volume.a").await.unwrap().expect("nobody has it");
    assert!(second.turn("volume.a").await.unwrap().is_none(), "one has it");

    let broken = tokio::spawn(async move {
        let _turn = turn;
        panic!("the job's task breaks");
    });

    assert!(broken.await.unwrap_err().is_panic());
    soon("the turn of a task that is gone", freed(&second)).await;
    assert_eq!(*first.state().borrow(), State::Connected);
}

#[tokio::test]
async fn what_is_put_off_is_recalled_before_its_time_and_the_rest_stays() {
    let settings = Settings { retry_delay_seconds: 3600, ..settings(Rabbit::shared().url()) };
    let broker = Broker::connect(settings.clone()).await.unwrap();
    let mut jobs = broker.jobs(1, 0);
    for body in ["a", "b", "c"] {
        publish(&broker, body).await;
        next(&mut jobs).await.retry_later("").await.unwrap();
    }

    let [recalled] = <[Delivery; 1]>::try_from(broker.recall(|body| body == b"b").await.unwrap()).unwrap();

    assert_eq!((text(&recalled.body), recalled.properties.attempt), ("b", 2));
    assert!(!recalled.redelivered, "who looked at it has not begun it");
    recalled.dead_letter("why").await.unwrap();
    let mut dead = broker.dead_letters().await.unwrap();
    let letter = dead.next().await.unwrap().unwrap();
    dead.retry(letter).await.unwrap();
    let again = next(&mut jobs).await;
    assert_eq!(text(&again.body), "b", "it is brought back to the job queue");
    again.ack().await.unwrap();
    // Dropped, they go back, and are found once more.
    soon("the others", async { while broker.recall(|_| true).await.unwrap().len() < 2 {} }).await;
    let mut others = Vec::new();
    let all = async {
        while others.len() < 2 {
            for other in broker.recall(|_| true).await.unwrap() {
                others.push(text(&other.body).to_owned());
                other.ack().await.unwrap();
            }
        }
    };
    soon("the others again", all).await;
    others.sort();
    assert_eq!(others, ["a", "c"]);
    drop(jobs);
    assert_queue_empty(&broker, &settings).await;
}

#[tokio::test]
async fn a_job_that_awaits_its_turn_comes_back_soon_and_that_is_no_attempt() {
    let settings = Settings { retry_delay_seconds: 3600, ..settings(Rabbit::shared().url()) };
    let broker = Broker::connect(settings).await.unwrap();
    publish(&broker, "a").await;
    let mut jobs = broker.jobs(1, 0);
    for _ in 0..2 {
        // An hour's wait would be in vain.
        soon("the end of it", next(&mut jobs).await.await_turn()).await.unwrap();
    }
    let again = next(&mut jobs).await;
    let Properties { attempt, parked, waits_since, .. } = again.properties;
    assert_eq!((text(&again.body), attempt, parked), ("a", 1, false));
    assert!(waits_since.is_some_and(|since| since == again.since && since < Timestamp::now()));
    again.ack().await.unwrap();
}

#[tokio::test]
async fn a_job_that_is_handed_back_in_good_order_is_not_taken_for_one_whose_worker_has_died() {
    let (broker, _) = shared().await;
    let mut jobs = broker.jobs(1, 0);
    // Its first worker dies, and the next one parks it.
    let again = redelivered(&broker, &mut jobs).await;
    soon("the end of it", again.park()).await.unwrap();
    let parked = next(&mut jobs).await;
    assert!(parked.properties.parked);

    soon("the end of it", parked.hand_back()).await.unwrap();

    let last = next(&mut jobs).await;
    let Properties { attempt, parked, waits_since, .. } = last.properties;
    assert_eq!((text(&last.body), attempt, parked, last.redelivered), ("a", 1, false, false));
    assert!(waits_since.is_some(), "a copy of it may be left, if the broker was lost meanwhile");
    last.ack().await.unwrap();
}

#[tokio::test]
async fn what_is_looked_at_ahead_comes_only_when_nobody_has_a_slot_for_it() {
    let (broker, settings) = shared().await;
    let other = Broker::connect(settings).await.unwrap();
    let (mut jobs, mut others) = (broker.jobs(1, 1), other.jobs(1, 0));
    let (mut consuming, mut others_consuming) = (jobs.consuming(), others.consuming());
    soon("all slots", consuming.wait_for(|count| *count == 2)).await.unwrap();
    soon("all slots", others_consuming.wait_for(|count| *count == 1)).await.unwrap();

    publish(&broker, "1").await;
    publish(&broker, "2").await;
    let held = [next(&mut jobs).await, next(&mut others).await];
    assert_none(&mut jobs).await;
    publish(&broker, "3").await;
    let ahead = next(&mut jobs).await;
    assert_eq!(text(&ahead.body), "3");

    for delivery in held.into_iter().chain([ahead]) {
        delivery.ack().await.unwrap();
    }
}

#[tokio::test]
async fn a_job_that_is_given_up_lies_in_the_dead_queue_with_the_reason() {
    let (broker, settings) = shared().await;
    let properties = Properties { message_id: Some("m".into()), ..Properties::default() };
    broker.publish_job(Bytes::from_static(b"bad"), properties).await.unwrap();
    let mut jobs = broker.jobs(1, 0);
    let reason = "no JSON: é ".to_string() + &"x".repeat(300_000);
    next(&mut jobs).await.dead_letter(&reason).await.unwrap();
    assert_none(&mut jobs).await;

    let channel = raw(&settings, Rabbit::shared().url()).await;
    let queue = format!("{}.dead", settings.prefix);
    let dead = channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap().unwrap();
    assert_eq!(dead.data, b"bad");
    assert_eq!(dead.properties.message_id().as_ref().unwrap().as_str(), "m");
    let headers = dead.properties.headers().as_ref().unwrap().inner();
    let AMQPValue::LongString(told) = &headers["x-backhaul-reason"] else { panic!("{headers:?}") };
    assert!(told.to_string().starts_with("no JSON: é x"));
    let from = AMQPValue::LongString(format!("{}.jobs", settings.prefix).as_str().into());
    assert_eq!(headers["x-backhaul-exchange"], from);
    assert_eq!(headers["x-backhaul-routing-key"], AMQPValue::LongString("job".into()));
}

#[tokio::test]
async fn what_was_given_up_is_looked_at_brought_back_and_dropped() {
    let (broker, settings) = shared().await;
    let mut jobs = broker.jobs(1, 0);
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    for body in ["a", "b", "c"] {
        publish(&broker, body).await;
        next(&mut jobs).await.retry_later("told").await.unwrap();
        next(&mut jobs).await.dead_letter(&format!("{body} is bad")).await.unwrap();
    }

    // Looking at them changes nothing.
    for _ in 0..2 {
        let mut letters = broker.dead_letters().await.unwrap();
        for body in ["a", "b", "c"] {
            let letter = letters.next().await.unwrap().unwrap();
            assert_eq!(
                (text(&letter.body), letter.reason.as_str()),
                (body, format!("{body} is bad").as_str())
            );
            assert_eq!((letter.properties.attempt, letter.properties.story.as_deref()), (2, Some("told")));
            assert!(letter.died_at_seconds.unwrap() >= before);
        }
        assert!(letters.next().await.unwrap().is_none());
        drop(letters);
        soon("the letters are back", async { while count(&settings, "dead").await < 3 {} }).await;
    }

    let mut letters = broker.dead_letters().await.unwrap();
    let (a, b) = (letters.next().await.unwrap().unwrap(), letters.next().await.unwrap().unwrap());
    letters.retry(a).await.unwrap();
    letters.drop(b).await.unwrap();
    drop(letters);
    let back = next(&mut jobs).await;
    let revived_at = back.properties.revived_at;
    let expected = Properties { revival_count: 1, revived_at, ..Properties::default() };
    assert_eq!((text(&back.body), &back.properties), ("a", &expected), "as if it were new");
    let revived_second = revived_at.unwrap().as_second();
    assert!(u64::try_from(revived_second).unwrap() >= before, "{revived_at:?}");
    back.dead_letter("bad again").await.unwrap();
    assert_none(&mut jobs).await;
    soon("c is back", async { while count(&settings, "dead").await < 2 {} }).await;
    let mut letters = broker.dead_letters().await.unwrap();
    let mut left = Vec::new();
    while let Some(letter) = letters.next().await.unwrap() {
        left.push((text(&letter.body).to_owned(), letter.properties.revival_count));
    }
    left.sort();
    assert_eq!(left, [("a".to_owned(), 1), ("c".to_owned(), 0)]);
}

/// Its sender had set an expiration.
#[tokio::test]
async fn a_message_that_the_broker_gave_up_by_itself_is_brought_back_to_the_job_queue() {
    let (broker, settings) = shared().await;
    let channel = raw(&settings, Rabbit::shared().url()).await;
    let (exchange, options) = (format!("{}.jobs", settings.prefix), BasicPublishOptions::default());
    let properties = BasicProperties::default().with_expiration("1".into()).with_message_id("m".into());
    let publish = channel.basic_publish(exchange.as_str().into(), "job".into(), options, b"a", properties);
    publish.await.unwrap().await.unwrap();
    soon("the broker has given it up", async { while count(&settings, "dead").await < 1 {} }).await;

    let mut letters = broker.dead_letters().await.unwrap();
    let letter = letters.next().await.unwrap().unwrap();
    assert!(letter.reason.contains("expired"), "{}", letter.reason);
    letters.retry(letter).await.unwrap();

    let mut jobs = broker.jobs(1, 0);
    let back = next(&mut jobs).await;
    let Properties { message_id, revival_count, .. } = &back.properties;
    assert_eq!((text(&back.body), message_id.as_deref(), *revival_count), ("a", Some("m"), 1));
    // Had it an expiration still, it would go once more while it waits.
    back.requeue().await.unwrap();
    next(&mut jobs).await.ack().await.unwrap();
    assert_eq!(count(&settings, "dead").await, 0);
}

#[tokio::test]
async fn letters_that_come_while_others_are_brought_back_are_left_for_the_next_time() {
    let (broker, settings) = shared().await;
    let mut jobs = broker.jobs(1, 0);
    for body in ["a", "b"] {
        publish(&broker, body).await;
        next(&mut jobs).await.dead_letter("bad").await.unwrap();
    }
    soon("both are there", async { while count(&settings, "dead").await < 2 {} }).await;

    let mut letters = broker.dead_letters().await.unwrap();
    for body in ["a", "b"] {
        let letter = letters.next().await.unwrap().unwrap();
        assert_eq!(text(&letter.body), body);
        letters.retry(letter).await.unwrap();
        next(&mut jobs).await.dead_letter("bad again").await.unwrap();
    }
    soon("both are there again", async { while count(&settings, "dead").await < 2 {} }).await;
    assert!(letters.next().await.unwrap().is_none());
}

#[tokio::test]
async fn a_job_waits_no_longer_than_the_limit_of_its_attempt_which_doubles_up_to_the_last_one() {
    let delays =
        Settings { retry_delay_seconds: 1, retry_delay_seconds_max: 100, ..settings(Rabbit::shared().url()) };
    let broker = Broker::connect(delays.clone()).await.unwrap();
    // One that waits for long keeps none back that waits less.
    let channel = raw(&delays, Rabbit::shared().url()).await;
    for queue in ["delay.1s", "delay.4s", "delay.16s", "delay.64s", "delay.100s"] {
        assert_eq!(count(&delays, queue).await, 0, "{queue}");
    }
    let mut waits = Vec::new();
    // What waits is drawn from all up to the limit, so one alone may have waited already when it is looked for.
    for attempt in [1, 2, 3, 7, 20, 20, 20, 20, 20, 20] {
        let properties = Properties { attempt, ..Properties::default() };
        broker.publish_job(Bytes::from_static(b"x"), properties).await.unwrap();
        let mut jobs = broker.jobs(1, 0);
        next(&mut jobs).await.retry_later("").await.unwrap();
        drop(jobs);
    }
    for queue in ["delay.100s", "delay.64s", "delay.16s", "delay.4s"] {
        while let Some(got) = channel
            .basic_get(format!("{}.{queue}", delays.prefix).into(), BasicGetOptions::default())
            .await
            .unwrap()
        {
            let wait: u64 = got.properties.expiration().as_ref().unwrap().as_str().parse().unwrap();
            let headers = got.properties.headers().as_ref().unwrap().inner();
            let AMQPValue::LongUInt(attempt) = headers["x-backhaul-attempt"] else { panic!("{headers:?}") };
            waits.push((attempt - 1, wait));
        }
    }
    for (attempt, wait) in &waits {
        let limit = (1000_u64 << (attempt - 1)).min(100_000);
        assert!(*wait <= limit, "attempt {attempt} waits {wait} ms");
    }
    assert!(waits.iter().any(|(attempt, _)| *attempt == 20), "{waits:?}");
    assert!(waits.iter().any(|(_, wait)| *wait > 1000), "{waits:?}");
}

#[tokio::test]
async fn without_a_queue_for_it_nothing_is_given_up() {
    let (broker, settings) = shared().await;
    publish(&broker, "a").await;
    let mut jobs = broker.jobs(1, 0);
    let delivery = next(&mut jobs).await;
    let channel = raw(&settings, Rabbit::shared().url()).await;
    let queue = format!("{}.dead", settings.prefix).into();
    channel.queue_delete(queue, QueueDeleteOptions::default()).await.unwrap();
    let error = delivery.dead_letter("bad").await.unwrap_err();
    assert!(matches!(error, Error::NoRoute { .. }), "{error:?}");
    let again = next(&mut jobs).await;
    assert!(again.redelivered);
    again.ack().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_given_up_does_not_come_again_at_full_speed() {
    let (broker, settings) = shared().await;
    publish(&broker, "a").await;
    let mut jobs = broker.jobs(1, 0);
    let channel = raw(&settings, Rabbit::shared().url()).await;
    let queue = format!("{}.dead", settings.prefix).into();
    channel.queue_delete(queue, QueueDeleteOptions::default()).await.unwrap();
    let began = Instant::now();
    for _ in 0..2 {
        next(&mut jobs).await.dead_letter("bad").await.unwrap_err();
    }
    assert!(began.elapsed() >= Duration::from_secs(3), "{:?}", began.elapsed());
    next(&mut jobs).await.ack().await.unwrap();
}

/// The address of a broker at which every "~" that is sent becomes a byte that no text has.
async fn garbling(url: &str) -> String {
    let address = |url: &str| url.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned();
    let broker = address(url);
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let garbling = url.replace(&broker, &listener.local_addr().unwrap().to_string());
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = tokio::net::TcpStream::connect(broker).await.unwrap();
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.split(), server.split());
        let there = async {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from_client.read(&mut bytes).await {
                bytes[..count].iter_mut().filter(|byte| **byte == b'~').for_each(|byte| *byte = 0xff);
                to_server.write_all(&bytes[..count]).await.unwrap();
            }
        };
        let back = async { tokio::io::copy(&mut from_server, &mut to_client).await.ok() };
        tokio::select! {
            () = there => {}
            _ = back => {}
        }
    });
    garbling
}

/// It took the connection with it, and came again on the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_names_that_are_no_text_is_taken_like_any_other() {
    let (broker, settings) = shared().await;
    let mut control = broker.control();
    let url = garbling(Rabbit::shared().url()).await;
    let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let mut inner = FieldTable::default();
    inner.insert("deep ~".into(), AMQPValue::Boolean(true));
    let mut headers = FieldTable::default();
    headers.insert("~".into(), AMQPValue::FieldArray(vec![AMQPValue::FieldTable(inner)].into()));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_content_type("text/~".into())
        .with_correlation_id("caf~".into())
        .with_reply_to("~".into())
        .with_message_id("~".into())
        .with_type("~".into())
        .with_app_id("~".into())
        .with_priority(3);
    // The worker's queue must be there: what is published before is not for it.
    soon("the subscription", async {
        loop {
            broker.publish_control(Bytes::from_static(b"probe"), Properties::default()).await.unwrap();
            if let Ok(Some(_)) = timeout(Duration::from_millis(300), control.next()).await {
                break;
            }
        }
    })
    .await;
    for (exchange, routing_key) in [("jobs", "job"), ("control", "~")] {
        let exchange = format!("{}.{exchange}", settings.prefix);
        channel
            .basic_publish(
                exchange.as_str().into(),
                routing_key.into(),
                BasicPublishOptions::default(),
                b"whole ~",
                properties.clone(),
            )
            .await
            .unwrap();
    }

    let mut jobs = broker.jobs(1, 0);
    let delivery = next(&mut jobs).await;
    let told = &delivery.properties;
    assert_eq!(told.correlation_id.as_deref(), Some("caf?"));
    assert_eq!((told.message_id.as_deref(), told.reply_to.as_deref()), (Some("?"), Some("?")));
    assert_eq!((told.content_type.as_deref(), told.priority), (Some("text/?"), Some(3)));
    assert_eq!(delivery.body, b"whole \xff".as_slice(), "what it holds is not ours to change");
    delivery.dead_letter("bad").await.unwrap();
    let notice = soon("the control message", async {
        loop {
            let notice = next_notice(&mut control).await;
            if notice.body != b"probe".as_slice() {
                break notice;
            }
        }
    })
    .await;
    assert_eq!(notice.routing_key, "?");
    let mut letters = broker.dead_letters().await.unwrap();
    let letter = letters.next().await.unwrap().unwrap();
    assert_eq!((letter.properties.message_id.as_deref(), letter.reason.as_str()), (Some("?"), "bad"));
    letters.drop(letter).await.unwrap();
}

/// The broker ended the connection over the copy, and handed the message out again.
#[tokio::test]
async fn a_message_whose_headers_leave_no_room_for_ours_is_moved_without_the_largest_of_them() {
    let (broker, settings) = shared().await;
    let channel = raw(&settings, Rabbit::shared().url()).await;
    let mut headers = FieldTable::default();
    headers.insert("small".into(), AMQPValue::LongString("kept".into()));
    headers.insert("large".into(), AMQPValue::LongString("x".repeat(130_900).into()));
    let publish = async || {
        let properties = BasicProperties::default().with_message_id("m".into()).with_headers(headers.clone());
        let exchange = format!("{}.jobs", settings.prefix).as_str().into();
        let options = BasicPublishOptions::default();
        channel.basic_publish(exchange, "job".into(), options, b"a", properties).await.unwrap();
    };
    let mut jobs = broker.jobs(1, 0);

    publish().await;
    next(&mut jobs).await.retry_later(&"s".repeat(5000)).await.unwrap();
    let again = next(&mut jobs).await;
    assert_eq!((again.properties.attempt, again.properties.message_id.as_deref()), (2, Some("m")));
    assert_eq!(again.properties.story, Some("s".repeat(5000)));
    again.ack().await.unwrap();
    publish().await;
    next(&mut jobs).await.dead_letter("bad").await.unwrap();

    let queue = format!("{}.dead", settings.prefix);
    let dead = channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap().unwrap();
    let headers = dead.properties.headers().as_ref().unwrap().inner();
    let text = |name: &str| headers.get(name).and_then(AMQPValue::as_long_string).map(ToString::to_string);
    assert_eq!((text("small"), text("large")), (Some("kept".into()), None));
    assert_eq!(text("x-backhaul-reason").as_deref(), Some("bad"));
    assert_eq!(text("x-backhaul-left-out").as_deref(), Some("large"));
}

#[tokio::test]
async fn what_may_not_be_put_off_does_not_come_again_at_full_speed() {
    let rabbit = Rabbit::start();
    let mut settings = settings(rabbit.url());
    let own = format!("^{}\\..*", settings.prefix);
    rabbit.ctl(&["add_user", "narrow", "hush"]);
    rabbit.ctl(&["set_permissions", "-p", "/", "narrow", &own, &own, &own]);
    settings.url = rabbit.url().replace("guest:guest", "narrow:hush").parse().unwrap();
    let broker = Broker::connect(settings).await.unwrap();
    publish(&broker, "a").await;
    let mut jobs = broker.jobs(2, 0);

    let began = Instant::now();
    for _ in 0..4 {
        let error = next(&mut jobs).await.retry_later("[]").await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    }
    assert!(began.elapsed() >= Duration::from_secs(9), "{:?}", began.elapsed());
}

#[tokio::test]
async fn after_stop_nothing_comes_and_what_was_taken_can_still_be_settled() {
    let (broker, settings) = shared().await;
    for body in ["1", "2", "3"] {
        publish(&broker, body).await;
    }
    let mut jobs = broker.jobs(2, 0);
    let taken = next(&mut jobs).await;
    jobs.stop();
    assert!(soon("the end", jobs.next()).await.is_none());
    // The slots have a channel each, so either of the first two messages can be the first to come.
    let mut expected = BTreeSet::from(["1".into(), "2".into(), "3".into(), "4".into()]);
    assert!(expected.remove(text(&taken.body)));
    taken.ack().await.unwrap();
    publish(&broker, "4").await;

    // What was handed to the other slot, and all the rest, is there for others.
    let mut others = broker.jobs(3, 0);
    let mut rest = BTreeSet::new();
    for _ in 0..3 {
        let delivery = next(&mut others).await;
        rest.insert(text(&delivery.body).to_string());
        delivery.ack().await.unwrap();
    }
    assert_eq!(rest, expected);
    drop(others);
    assert_queue_empty(&broker, &settings).await;
}

#[tokio::test]
async fn close_gives_back_what_was_handed_out() {
    let (broker, settings) = shared().await;
    publish(&broker, "a").await;
    let mut jobs = broker.jobs(1, 0);
    let delivery = next(&mut jobs).await;
    let lost = delivery.lost();
    soon("close", broker.close()).await;
    soon("the loss", lost).await;
    assert!(matches!(delivery.ack().await, Err(Error::DeliveryLost)));
    assert!(soon("the end", jobs.next()).await.is_none());
    let error = broker.publish_job(Bytes::new(), Properties::default()).await.unwrap_err();
    assert!(matches!(error, Error::Closed), "{error:?}");
    assert!(matches!(*broker.state().borrow(), State::Disconnected { .. }));

    let other = Broker::connect(settings).await.unwrap();
    let again = next(&mut other.jobs(1, 0)).await;
    assert!(again.redelivered);
    again.ack().await.unwrap();
}

#[tokio::test]
async fn control_messages_reach_every_worker_and_events_those_who_asked() {
    let (broker, settings) = shared().await;
    let other = Broker::connect(settings.clone()).await.unwrap();
    let mut controls = [broker.control(), other.control()];
    let mut heard = [0, 0];
    // There is no telling when the second queue is bound, so this asks until both have heard.
    let deadline = Instant::now() + PATIENCE;
    while heard.contains(&0) {
        assert!(Instant::now() < deadline, "heard {heard:?}");
        broker.publish_control(Bytes::from_static(b"stop"), Properties::default()).await.unwrap();
        for (control, heard) in controls.iter_mut().zip(&mut heard) {
            if let Ok(notice) = timeout(Duration::from_millis(100), control.next()).await {
                assert_eq!(text(&notice.unwrap().body), "stop");
                *heard += 1;
            }
        }
    }

    let mut backups = other.events("backup.#").await.unwrap();
    let mut all = other.events("#").await.unwrap();
    for key in ["restore.started.v", "backup.started.v"] {
        let routed = broker.publish_event(key, Bytes::from(key), Properties::default()).await;
        assert_eq!(routed.unwrap(), Routed::Queued);
    }
    assert_eq!(next_notice(&mut backups).await.routing_key, "backup.started.v");
    let seen = next_notice(&mut all).await;
    assert_eq!((seen.routing_key.as_str(), text(&seen.body)), ("restore.started.v", "restore.started.v"));
    assert_eq!(next_notice(&mut all).await.routing_key, "backup.started.v");

    // Who has gone leaves no queue behind.
    drop((backups, all));
    soon("the queues to go", async {
        loop {
            let nowhere = broker.publish_event("x", Bytes::new(), Properties::default()).await.unwrap();
            if nowhere == Routed::Nowhere {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_job_queue_that_somebody_deleted_is_made_again() {
    let (broker, settings) = shared().await;
    let mut jobs = broker.jobs(1, 0);
    publish(&broker, "a").await;
    next(&mut jobs).await.ack().await.unwrap();
    let channel = raw(&settings, Rabbit::shared().url()).await;
    let queue = format!("{}.jobs", settings.prefix).into();
    channel.queue_delete(queue, QueueDeleteOptions::default()).await.unwrap();
    soon("the queue", async {
        while broker.publish_job(Bytes::from_static(b"b"), Properties::default()).await.unwrap()
            == Routed::Nowhere
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let delivery = next(&mut jobs).await;
    assert_eq!(text(&delivery.body), "b");
}

#[tokio::test]
async fn classic_queues_heed_priorities() {
    let settings = Settings { queue_kind: QueueKind::Classic, ..settings(Rabbit::shared().url()) };
    let broker = Broker::connect(settings.clone()).await.unwrap();
    for (body, priority) in [("low", 1), ("high", 9)] {
        let properties = Properties { priority: Some(priority), ..Properties::default() };
        broker.publish_job(Bytes::from(body), properties).await.unwrap();
    }
    let mut jobs = broker.jobs(1, 0);
    let high = next(&mut jobs).await;
    assert_eq!(text(&high.body), "high");
    high.ack().await.unwrap();
    let low = next(&mut jobs).await;
    low.retry_later("").await.unwrap();
    let low = next(&mut jobs).await;
    assert_eq!((text(&low.body), low.properties.attempt, low.properties.priority), ("low", 2, Some(1)));
    low.dead_letter("bad").await.unwrap();
    assert_eq!(count(&settings, "dead").await, 1);

    // Connecting again finds everything as it should be; asking for the other kind does not.
    Broker::connect(settings.clone()).await.unwrap();
    let quorum = Settings { queue_kind: QueueKind::Quorum, ..settings };
    let error =
        Broker::connect(quorum.clone()).await.err().expect("a classic queue taken for a quorum queue");
    assert!(matches!(error, Error::Mismatch { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Permanent);
    let told = Causes(&error).to_string();
    for part in [&format!("queue {}.jobs", quorum.prefix), "broker.queue", "delete it", "inequivalent arg"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
}

#[tokio::test]
async fn that_a_job_left_something_half_done_goes_with_its_message_wherever_that_goes() {
    let (broker, _) = shared().await;
    publish(&broker, "a").await;
    let mut jobs = broker.jobs(1, 0);
    let mut first = next(&mut jobs).await;
    assert!(!first.properties.unfinished);
    first.note_unfinished();
    first.retry_later("").await.unwrap();
    let second = next(&mut jobs).await;
    assert!(second.properties.unfinished);
    second.hand_back().await.unwrap();
    let third = next(&mut jobs).await;
    assert!(third.properties.unfinished && third.properties.attempt == 2);
    third.dead_letter("bad").await.unwrap();
    let mut letters = broker.dead_letters().await.unwrap();
    let letter = letters.next().await.unwrap().unwrap();
    letters.retry(letter).await.unwrap();
    let fourth = next(&mut jobs).await;
    assert!(fourth.properties.unfinished && fourth.properties.revival_count == 1);
    fourth.ack().await.unwrap();
}

/// As with one older than 3.10, whose quorum queues have no time to live.
#[tokio::test]
async fn a_broker_that_takes_no_quorum_queue_for_jobs_that_wait_has_a_classic_one() {
    let settings = settings(Rabbit::shared().url());
    let channel = raw(&settings, Rabbit::shared().url()).await;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("classic"));
    arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(1000));
    arguments.insert("x-dead-letter-exchange".into(), text(&format!("{}.jobs", settings.prefix)));
    arguments.insert("x-dead-letter-routing-key".into(), text("job"));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let delay = format!("{}.delay.1s", settings.prefix).into();
    channel.queue_declare(delay, durable, arguments).await.unwrap();

    let broker = Broker::connect(settings).await.unwrap();

    publish(&broker, "a").await;
    let mut jobs = broker.jobs(1, 0);
    next(&mut jobs).await.retry_later("").await.unwrap();
    let again = next(&mut jobs).await;
    assert_eq!(again.properties.attempt, 2);
    again.ack().await.unwrap();
}

/// RabbitMQ 4 gives up what was delivered 20 times unless told otherwise, and whoever looks for jobs to end gives all others back:
/// some ten cancels sent all that waited back before its time.
#[tokio::test]
async fn what_waits_may_be_looked_at_without_limit_and_a_queue_made_with_one_is_used_on() {
    let rabbit = Rabbit::start();
    let settings = settings(rabbit.url());
    let channel = raw(&settings, rabbit.url()).await;
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(1000));
    arguments.insert("x-dead-letter-exchange".into(), text(&format!("{}.jobs", settings.prefix)));
    arguments.insert("x-dead-letter-routing-key".into(), text("job"));
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let [old, new] = ["1s", "4s"].map(|wait| format!("{}.delay.{wait}", settings.prefix));
    channel.queue_declare(old.as_str().into(), durable, arguments).await.unwrap();

    Broker::connect(settings).await.unwrap();

    let listed = rabbit.ctl(&["list_queues", "--quiet", "name", "arguments"]);
    let is_limitless = |queue: &str| {
        let arguments = listed.lines().find(|line| line.starts_with(queue));
        arguments.unwrap_or_else(|| panic!("no {queue}: {listed}")).contains("x-delivery-limit")
    };
    assert!(is_limitless(&new) && !is_limitless(&old), "{listed}");
}

#[tokio::test]
async fn who_cannot_get_in_is_told_why_and_never_the_password() {
    let url = Rabbit::shared().url().replace(":guest@", ":hush@");
    let error = Broker::connect(settings(&url)).await.err().expect("let in with a wrong password");
    assert!(matches!(error, Error::Credentials { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Permanent);
    let told = format!("{} {error:?}", Causes(&error));
    assert!(told.contains("\"guest\"") && !told.contains("hush"), "{told}");
    assert!(!format!("{:?}", settings(&url)).contains("hush"));

    // A worker keeps trying, and its state tells the same.
    let broker = Broker::start(settings(&url)).unwrap();
    let mut state = broker.state();
    let refused = |state: &State| state.to_string().contains("refuses user \"guest\"");
    let state = soon("the refusal", state.wait_for(refused)).await.unwrap().to_string();
    assert!(!state.contains("hush"), "{state}");

    let url = Rabbit::shared().url().replace("%2f", "nowhere");
    let error = Broker::connect(settings(&url)).await.err().expect("let into a vhost that is not there");
    assert!(matches!(error, Error::VirtualHost { .. }), "{error:?}");
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[tokio::test]
async fn what_does_not_answer_is_told_with_its_address() {
    let address = format!("127.0.0.1:{}", free_port());
    let settings = Settings { publish_seconds_max: 1, ..settings(&format!("amqp://u:hush@{address}/%2f")) };
    let error = Broker::connect(settings.clone()).await.err().expect("connected to nothing");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Transient);
    let told = Causes(&error).to_string();
    assert!(told.contains(&address) && told.contains("refused"), "{told}");

    let broker = Broker::start(settings).unwrap();
    let mut state = broker.state();
    soon("the refusal", state.wait_for(|state| state.to_string().contains("refused"))).await.unwrap();
    let error = broker.publish_job(Bytes::new(), Properties::default()).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Transient);
    assert!(error.to_string().contains(&address), "{error}");
    soon("close", broker.close()).await;
}

#[tokio::test]
async fn what_is_no_broker_is_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let web_server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut header = [0; 8];
        client.read_exact(&mut header).unwrap();
        client.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").unwrap();
        header
    });
    let settings = settings(&format!("amqp://guest:guest@{address}/%2f"));
    let error = Broker::connect(settings).await.err().expect("connected to a web server");
    assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
    assert_eq!(&web_server.join().unwrap(), b"AMQP\0\0\x09\x01");
}

#[tokio::test]
async fn who_takes_a_connection_and_says_nothing_is_given_up_and_holds_no_thread() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://guest:guest@{}/%2f", listener.local_addr().unwrap());
    let error = Broker::connect(settings(&url)).await.err().expect("connected to nobody");
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    soon("the thread's end", async {
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let is_lapin = |task: &PathBuf| {
            std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("lapin"))
        };
        while threads().any(|task| is_lapin(&task)) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_worker_outlives_its_broker() {
    let rabbit = Rabbit::start();
    let settings = settings(rabbit.url());
    // The worker begins before there is a connection.
    let broker = Broker::start(settings.clone()).unwrap();
    let mut jobs = broker.jobs(2, 0);
    let mut control = broker.control();
    let mut events = broker.events("#").await.unwrap();
    publish(&broker, "held").await;
    let held = next(&mut jobs).await;
    let lost = held.lost();

    rabbit.ctl(&["stop_app"]);
    soon("the loss", lost).await;
    assert!(matches!(held.ack().await, Err(Error::DeliveryLost)));
    let mut state = broker.state();
    soon("the state", state.wait_for(|state| *state != State::Connected)).await.unwrap();
    let during = tokio::spawn({
        let broker = broker.clone();
        async move { broker.publish_job(Bytes::from_static(b"during"), Properties::default()).await }
    });
    let event = tokio::spawn({
        let broker = broker.clone();
        async move { broker.publish_event("a.b.c", Bytes::from_static(b"event"), Properties::default()).await }
    });
    rabbit.ctl(&["start_app"]);

    assert_eq!(soon("the publish", during).await.unwrap().unwrap(), Routed::Queued);
    // The queue of the subscription was there all the time.
    assert_eq!(soon("the publish", event).await.unwrap().unwrap(), Routed::Queued);
    assert_eq!(next_notice(&mut events).await.routing_key, "a.b.c");
    let mut bodies = BTreeSet::new();
    for _ in 0..2 {
        let delivery = next(&mut jobs).await;
        assert_eq!(delivery.redelivered, text(&delivery.body) == "held");
        bodies.insert(text(&delivery.body).to_string());
        delivery.ack().await.unwrap();
    }
    assert_eq!(bodies, BTreeSet::from(["held".into(), "during".into()]));

    // Again, but only the connections go.
    publish(&broker, "held").await;
    let held = next(&mut jobs).await;
    let lost = held.lost();
    rabbit.ctl(&["close_all_connections", "test"]);
    soon("the loss", lost).await;
    assert!(matches!(held.retry_later("").await, Err(Error::DeliveryLost)));
    let again = next(&mut jobs).await;
    assert!(again.redelivered);
    again.ack().await.unwrap();
    broker.publish_control(Bytes::from_static(b"stop"), Properties::default()).await.unwrap();
    assert_eq!(text(&next_notice(&mut control).await.body), "stop");
    assert_none(&mut jobs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_falls_silent_is_lost_as_soon_as_its_heartbeats_are_missed() {
    let link = Link::to(Rabbit::shared().url());
    let settings = Settings { heartbeat_seconds: 1, ..settings(link.url()) };
    let broker = Broker::connect(settings).await.unwrap();
    let mut state = broker.state();
    assert_eq!(*state.borrow(), State::Connected);

    link.stall(true);

    // TCP alone would tell it in minutes, and the broker proposes 60 seconds.
    let lost = timeout(Duration::from_secs(15), state.wait_for(|state| *state != State::Connected)).await;
    drop(lost.expect("that the broker is silent goes unnoticed").unwrap());
    link.stall(false);
    drop(soon("another connection", state.wait_for(|state| *state == State::Connected)).await.unwrap());
    publish(&broker, "a").await;
}

#[tokio::test]
async fn a_delivery_that_took_too_long_for_the_broker_is_lost_and_comes_again() {
    let rabbit = Rabbit::start_with(&["consumer_timeout = 5000"]);
    // How often the broker looks; a minute unless told otherwise.
    rabbit.ctl(&["eval", "application:set_env(rabbit, channel_tick_interval, 1000)."]);
    let broker = Broker::connect(settings(rabbit.url())).await.unwrap();
    let mut jobs = broker.jobs(1, 0);
    publish(&broker, "slow").await;
    let slow = next(&mut jobs).await;
    soon("the loss", slow.lost()).await;
    let error = slow.ack().await.unwrap_err();
    assert!(matches!(error, Error::DeliveryLost), "{error:?}");
    assert_eq!(error.class(), Class::Transient);
    let again = next(&mut jobs).await;
    assert!(again.redelivered);
    again.ack().await.unwrap();
    assert_eq!(*broker.state().borrow(), State::Connected, "only the channel was closed");
    assert_none(&mut jobs).await;
}

// On several threads, so that heartbeats go on while `rabbitmqctl` is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn tls_with_an_authority_of_ones_own_and_a_client_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    certificates(folder.path());
    let port = free_port();
    let line = |name: &str, value: &Path| format!("{name} = {}", value.display());
    let conf = [
        format!("listeners.ssl.1 = 127.0.0.1:{port}"),
        format!("listeners.ssl.2 = 127.0.0.2:{port}"),
        line("ssl_options.cacertfile", &file("ca.pem")),
        line("ssl_options.certfile", &file("server.pem")),
        line("ssl_options.keyfile", &file("server.key")),
        "ssl_options.verify = verify_peer".into(),
        "ssl_options.fail_if_no_peer_cert = true".into(),
    ];
    let rabbit = Rabbit::start_with(&conf.each_ref().map(String::as_str));
    let url = format!("amqps://guest:guest@localhost:{port}/%2f");
    let tls = Tls {
        ca_file: Some(file("ca.pem")),
        client_certificate_file: Some(file("client.pem")),
        client_key_file: Some(file("client.key")),
    };
    let with = |tls: Tls| Settings { tls, ..settings(&url) };

    let broker = Broker::connect(with(tls.clone())).await.unwrap();
    publish(&broker, "a").await;
    next(&mut broker.jobs(1, 0)).await.ack().await.unwrap();
    let connections = rabbit.ctl(&["list_connections", "ssl", "peer_cert_subject"]);
    assert!(connections.contains("true\tCN=client"), "{connections}");

    for (what, tls) in [
        ("an authority that did not sign", Tls { ca_file: Some(file("other.pem")), ..tls.clone() }),
        ("no authority", Tls { ca_file: None, ..tls.clone() }),
        (
            "no client certificate",
            Tls { client_certificate_file: None, client_key_file: None, ..tls.clone() },
        ),
    ] {
        let error = Broker::connect(with(tls)).await.err().unwrap_or_else(|| panic!("connected with {what}"));
        assert!(matches!(error, Error::Tls { .. }), "{what}: {error:?}");
        assert_eq!(error.class(), Class::Permanent);
        assert!(error.to_string().contains("ca_file"), "{error}");
    }

    // The authority is right, and the certificate is not for this name.
    let other = Settings { tls: tls.clone(), ..settings(&url.replace("localhost", "127.0.0.2")) };
    let error = Broker::connect(other).await.err().expect("connected to a server of another name");
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");

    let missing = Tls { ca_file: Some(file("missing.pem")), ..tls.clone() };
    let error = Broker::connect(with(missing)).await.err().expect("connected without its file");
    assert!(matches!(error, Error::TlsFile { .. }), "{error:?}");
    assert!(error.to_string().contains("missing.pem"), "{error}");
    let half = Tls { client_key_file: None, ..tls.clone() };
    let error = Broker::connect(with(half)).await.err().expect("connected without its key");
    assert!(matches!(error, Error::TlsPair), "{error:?}");

    // TLS to a port that speaks none.
    let plain = rabbit.url().replace("amqp:", "amqps:");
    let error =
        Broker::connect(Settings { tls, ..settings(&plain) }).await.err().expect("TLS with a plain port");
    assert!(matches!(error, Error::Tls { .. }), "{error:?}");
}

/// Makes two authorities, and a server's and a client's certificate signed by the first.
fn certificates(folder: &Path) {
    let openssl = |arguments: &str| {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    std::fs::write(folder.join("names"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    for name in ["ca", "other"] {
        openssl(&format!("req -x509 {key} -days 2 -subj /CN={name} -keyout {name}.key -out {name}.pem"));
    }
    for name in ["server", "client"] {
        openssl(&format!("req {key} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out {name}.pem"
        ));
    }
}
