//! How operations are sent, how a lost reply is made up for, and how the model is kept up to date.

use std::collections::BTreeSet;

use florence_tests::eventually;
use redis::{Connection, Pipeline, RedisResult, Value};

use super::{
    Driver, FINAL,
    model::{Ended, Model, Place},
    steps::Step,
};

/// The database of the key `last`, which tells the last operation; jobs are in 0 and 1.
const NOTES: usize = 2;

/// Reads the states of some keys, then runs its commands. The states are the reply; they are also
/// written to the key `last`, for a client that does not get the reply.
const SCRIPT: &str = "
local at = 2
local function take() at = at + 1 return ARGV[at - 1] end
local states = {}
for i = 1, tonumber(take()) do
  redis.call('SELECT', take())
  states[i] = redis.call('HGET', take(), 'state') or 'none'
end
local final = {done = true, failed = true, cancelled = true, expired = true}
for _ = 1, tonumber(take()) do
  local args = {}
  for i = 1, tonumber(take()) do args[i] = take() end
  if args[1] == 'EDIT' then
    if not final[redis.call('HGET', args[2], 'state')] then
      redis.call('HSET', args[2], 'image', args[3], 'prompt', args[4])
    end
  elseif args[1] == 'CLONE' then
    redis.call('RESTORE', args[3], 0, redis.call('DUMP', args[2]), 'REPLACE')
  else
    redis.call(unpack(args))
  end
end
redis.call('SELECT', 2)
redis.call('SET', 'last', ARGV[1] .. ' ' .. table.concat(states, ' '))
return states
";

/// How an operation is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Bare,
    Multi,
    Script,
}

/// An operation, ready to be sent.
pub(super) struct Request {
    number: usize,
    form: Form,
    steps: Vec<Step>,
    /// The places whose states come first in the reply.
    watched: Vec<Place>,
    pipeline: Pipeline,
    replies: usize,
    /// Whether the reply also has the target's state afterwards; only for a bare operation.
    looks_after: bool,
}

impl Request {
    fn new(number: usize, form: Form, steps: Vec<Step>, model: &Model) -> Self {
        let (mut places, mut is_swapped) = (BTreeSet::new(), false);
        for step in &steps {
            // Where the place was when the operation began.
            let origin = |(db, key)| (if is_swapped { 1 - db } else { db }, key);
            places.extend(step.places().into_iter().map(origin));
            is_swapped ^= matches!(step, Step::Swap);
        }
        let watched: Vec<Place> =
            places.into_iter().filter(|place| model.jobs.contains_key(place)).collect();
        let mut pipeline = redis::pipe();
        if form == Form::Script {
            let script = pipeline.cmd("EVAL").arg(SCRIPT).arg(0).arg(number).arg(watched.len());
            for (db, key) in &watched {
                script.arg(*db).arg(key);
            }
            script.arg(2 * steps.len());
            for step in &steps {
                let (db, command) = step.command();
                script.arg(2).arg("SELECT").arg(db).arg(command.len()).arg(command);
            }
            return Self { number, form, steps, watched, pipeline, replies: 1, looks_after: false };
        }
        let state = |pipeline: &mut Pipeline, (db, key): &Place| {
            pipeline.cmd("SELECT").arg(*db).cmd("HGET").arg(key).arg("state");
        };
        for place in &watched {
            state(&mut pipeline, place);
        }
        for step in &steps {
            let (db, command) = step.command();
            let name = String::from_utf8_lossy(&command[0]).into_owned();
            pipeline.cmd("SELECT").arg(db).cmd(&name).arg(&command[1..]);
        }
        let target = steps[0].target().filter(|_| form == Form::Bare);
        if let Some(target) = &target {
            state(&mut pipeline, target);
        }
        pipeline.cmd("SELECT").arg(NOTES).cmd("SET").arg("last").arg(number);
        let mut replies = pipeline.len();
        if form == Form::Multi {
            pipeline.atomic();
            // MULTI and EXEC have replies too.
            replies += 2;
        }
        let looks_after = target.is_some();
        Self { number, form, steps, watched, pipeline, replies, looks_after }
    }

    pub(super) fn send(&self, connection: &mut Connection) -> RedisResult<()> {
        connection.send_packed_command(&self.pipeline.get_packed_pipeline())
    }

    /// The states of the watched keys before the operation; if it is bare, also its target's after.
    pub(super) fn receive(&self, connection: &mut Connection) -> RedisResult<Vec<String>> {
        let (mut values, mut refused) = (Vec::new(), None);
        for _ in 0..self.replies {
            match connection.recv_response()?.extract_error() {
                Ok(value) => values.push(value),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        if let Some(error) = refused {
            return Err(error);
        }
        if self.form != Form::Bare {
            // EXEC's reply, or the script's.
            let last = values.pop().unwrap_or(Value::Nil);
            values = redis::from_owned_redis_value(last)?;
        }
        let state = |value: Value| {
            let state: Option<String> = redis::from_owned_redis_value(value)?;
            Ok(state.unwrap_or("none".to_owned()))
        };
        if self.form == Form::Script {
            return values.into_iter().map(state).collect();
        }
        // The replies to the two commands of the note follow it.
        let after = self.looks_after.then(|| values.len() - 3);
        let is_state = |i: usize| (i < 2 * self.watched.len() && i % 2 == 1) || Some(i) == after;
        let values = values.into_iter().enumerate();
        values.filter(|(i, _)| is_state(*i)).map(|(_, value)| state(value)).collect()
    }

    fn note(&self) -> String {
        let steps: Vec<String> = self.steps.iter().map(ToString::to_string).collect();
        format!("{} {:?} {}", self.number, self.form, steps.join("; "))
    }
}

impl Driver {
    pub(super) fn submit(&mut self) {
        let step = self.submission();
        let form = *self.random.pick(&[Form::Bare, Form::Bare, Form::Multi, Form::Script]);
        for _ in 0..10 {
            if self.perform(vec![step.clone()], form) {
                return;
            }
        }
        self.fail(&format!("not accepted: {step}"), None);
    }

    /// Keeps the DUMP of a job for later.
    pub(super) fn dump(&mut self) {
        let Some(place) = Self::some_job(&mut self.random, &self.model) else { return };
        let mut pipeline = redis::pipe();
        pipeline.atomic().cmd("SELECT").arg(place.0).ignore();
        pipeline.cmd("HGET").arg(&place.1).arg("state").cmd("DUMP").arg(&place.1);
        let asked = self.connection().and_then(|connection| pipeline.query(connection));
        let (state, payload): (String, Vec<u8>) = match asked {
            Ok(reply) => reply,
            Err(error) if self.is_lost(&error) => {
                self.connection = None;
                return;
            }
            Err(error) => self.fail(&format!("DUMP {place:?}: {error}"), Some(&place)),
        };
        let mut job = self.model.jobs[&place].clone();
        job.ended = if FINAL.contains(&state.as_str()) { Ended::Yes } else { Ended::No };
        self.shelf.push((payload, job, self.epoch));
        if self.shelf.len() > 6 {
            self.shelf.remove(0);
        }
    }

    /// Sends an operation and updates the model. False if the operation did not take place.
    pub(super) fn perform(&mut self, steps: Vec<Step>, form: Form) -> bool {
        let request = self.request(steps, form);
        let received = self.connection().and_then(|connection| {
            request.send(connection)?;
            request.receive(connection)
        });
        match received {
            Ok(states) if self.confirm() => self.settle(&request, Some(&states)),
            Err(error) if !self.is_lost(&error) => {
                let place = request.watched.first();
                self.fail(&format!("{}: {error}", request.note()), place)
            }
            _ => return self.look_up(&request),
        }
        true
    }

    pub(super) fn request(&mut self, steps: Vec<Step>, form: Form) -> Request {
        self.number += 1;
        Request::new(self.number, form, steps, &self.model)
    }

    /// Waits until the replicas that could be promoted have the last operation. False if there is
    /// another master by then.
    pub(super) fn confirm(&mut self) -> bool {
        if self.fleet.sentinels.is_empty() {
            return true;
        }
        let replicas = self.fleet.replicas().count();
        eventually("a replica confirms", || {
            let confirmed = self.ask::<usize>(&["WAIT", &replicas.to_string(), "500"]);
            // While one is away, only the other one can be promoted.
            let enough = confirmed.as_ref().is_ok_and(|confirmed| {
                *confirmed == replicas || *confirmed > 0 && !self.fleet.is_whole()
            });
            if enough {
                return Some(true);
            }
            let is_other = self.fleet.find_master().is_some_and(|found| found != self.fleet.master);
            (confirmed.is_err() || is_other).then_some(false)
        })
    }

    /// Finds out whether an operation took place, after its reply was lost.
    pub(super) fn look_up(&mut self, request: &Request) -> bool {
        let note = eventually("there is a master that answers", || {
            self.connection = None;
            self.ask::<()>(&["SELECT", &NOTES.to_string()]).ok()?;
            // What is read only counts if the replicas have it too. WAIT confirms that, but only
            // after a write.
            self.ask::<()>(&["SET", "looked", "up"]).ok()?;
            let note = self.ask::<Option<String>>(&["GET", "last"]).ok()?;
            self.confirm().then_some(note)
        });
        let note = note.unwrap_or_default();
        let mut words = note.split(' ').map(str::to_owned);
        if words.next() == Some(request.number.to_string()) {
            let states: Vec<String> = words.filter(|word| !word.is_empty()).collect();
            self.settle(request, Some(&states[..]).filter(|_| request.form == Form::Script));
            return true;
        }
        // The note of a bare operation may be missing, but its effect can be seen in the keys.
        let step = &request.steps[0];
        let place = match step {
            Step::Rename { db, from, .. } | Step::Move { db, key: from } => (*db, from.clone()),
            step => step.target().unwrap_or_default(),
        };
        if request.form != Form::Bare {
            return false;
        }
        let exists = self.ask::<()>(&["SELECT", &place.0.to_string()]);
        let exists = exists.and_then(|()| self.ask::<bool>(&["EXISTS", &place.1])).unwrap();
        let has_gone = matches!(step, Step::Rename { .. } | Step::Move { .. });
        let took_place = exists != has_gone;
        if took_place {
            self.settle(request, None);
        }
        took_place
    }

    /// Records an operation that took place, and the states before it if they are known.
    pub(super) fn settle(&mut self, request: &Request, states: Option<&[String]>) {
        let note = request.note();
        let before = states.map_or("states unknown".to_owned(), |states| states.join(" "));
        self.log.push(format!("{note} (before, {:?}: {before})", request.watched));
        let is_exact = request.form != Form::Bare;
        for (i, place) in request.watched.iter().enumerate() {
            let Some(states) = states else {
                self.model.doubt(place);
                continue;
            };
            if states[i] == "none" {
                self.fail(&format!("{place:?} is lost, found by {note}"), Some(place));
            }
            let is_steady = self.model.observe(place, &states[i]);
            if !is_steady && self.fleet.sentinels.is_empty() {
                self.problems.push(format!("{place:?} had ended, and has not at {note}"));
            }
            if is_exact || FINAL.contains(&states[i].as_str()) {
                continue;
            }
            // The job may have ended since its state was read. If it was not overwritten, a later
            // state that is not final shows that it had not.
            let is_overwritten = request.steps[0].target().as_ref() == Some(place);
            let after = states.last().filter(|_| request.looks_after && !is_overwritten);
            if after.is_none_or(|after| FINAL.contains(&after.as_str())) {
                self.model.doubt(place);
            }
        }
        for step in &request.steps {
            self.model.apply(step, &note);
        }
    }
}
