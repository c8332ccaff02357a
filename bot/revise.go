package bot

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// How answers stay true: when the verdict on a message changes within a day, its answer is edited; when it becomes worse, the room is
// also told in a new message, since nobody reads edits of what they have read.

const (
	// answersStayTrue is how long an answer is corrected.
	answersStayTrue = 24 * time.Hour
	// editPause is the least time between two edits of an answer; limits.edits_per_room is the most edits in a room within that time.
	editPause = time.Minute
	// dueAtOnce is how many edits are looked at in one go.
	dueAtOnce   = 200
	forgetEvery = time.Hour
	reviseRetry = 5 * time.Second
)

// reviser corrects the answers. Its fields up to wake are set before it runs.
type reviser struct {
	records *records
	log     zerolog.Logger
	clock   func() time.Time
	// review gives the verdict that a message would get now.
	review func(ctx context.Context, told cryptohook.Verdict, sender id.UserID) (cryptohook.Verdict, error)
	// send sends a message until the homeserver has it, and says no when it refuses it for good, or the context ends.
	send func(ctx context.Context, roomID id.RoomID, content *event.Content, transactionID string) (id.EventID, bool)
	// react puts a sign to a message, and takeBack redacts an event of ours, in the same way.
	react    func(ctx context.Context, roomID id.RoomID, to id.EventID, sign, transactionID string) (id.EventID, bool)
	takeBack func(ctx context.Context, roomID id.RoomID, eventID id.EventID)
	// hold waits while the bot may not say anything: see selfWatch.
	hold func(ctx context.Context) (held, ok bool)
	// annotate, shield, sign and kindOf are the bot's: how it shows a verdict, and whether it mentions it in a room.
	annotate func(v cryptohook.Verdict) annotation
	shield   func(code cryptohook.Code) cryptohook.Shield
	sign     func(v cryptohook.Verdict) string
	kindOf   func(roomID id.RoomID, v cryptohook.Verdict) answerKind
	// speech is the language of a room.
	speech func(roomID id.RoomID) speech
	// editsPerRoom is how many edits a minute there may be in a room; metrics counts them.
	editsPerRoom int
	metrics      *metrics

	wake chan struct{}
	// working is held by who corrects: the worker, or a handler with a key that came late.
	working sync.Mutex
	// edited are the times of the last edits in each room.
	edited map[id.RoomID][]time.Time

	mu sync.Mutex
	// pending is everything when the worker starts.
	pending doubtedAnswers
}

func (b *Bot) newReviser() *reviser {
	return &reviser{
		records: newRecords(b.db, b.owner, cryptohook.DatabaseLog(b.log)),
		log:     b.log.With().Str("component", "reviser").Logger(), clock: b.clock,
		review: func(ctx context.Context, told cryptohook.Verdict, sender id.UserID) (cryptohook.Verdict, error) {
			return b.hook.Review(ctx, told, sender)
		},
		send: b.send, react: b.react, takeBack: b.takeBack, hold: b.self.hold,
		annotate: b.annotate, shield: b.shield, sign: b.sign, kindOf: b.kindOf, speech: b.speech, editsPerRoom: b.config.Limits.EditsPerRoom, metrics: b.metrics,
		wake: make(chan struct{}, 1), edited: make(map[id.RoomID][]time.Time), pending: everythingDoubted(),
	}
}

func everythingDoubted() doubtedAnswers {
	all := nothingDoubted()
	all.everything = true
	return all
}

// doubtedAnswers are the answers whose verdicts may have changed since they were looked at.
type doubtedAnswers struct {
	everything bool
	users      map[id.UserID]struct{}
	sessions   map[id.SessionID]struct{}
	// messages are those by themselves: what was just said of one says nothing about the others of its session.
	messages map[id.EventID]struct{}
}

func nothingDoubted() doubtedAnswers {
	return doubtedAnswers{users: make(map[id.UserID]struct{}), sessions: make(map[id.SessionID]struct{}), messages: make(map[id.EventID]struct{})}
}

func (d *doubtedAnswers) add(more doubtedAnswers) {
	d.everything = d.everything || more.everything
	maps.Copy(d.users, more.users)
	maps.Copy(d.sessions, more.sessions)
	maps.Copy(d.messages, more.messages)
}

// changed is told what may have changed verdicts. It does not wait.
func (r *reviser) changed(change cryptohook.Change) {
	more := nothingDoubted()
	for _, userID := range change.Users {
		more.users[userID] = struct{}{}
	}
	for _, sessionID := range change.Sessions {
		if sessionID != "" { // what was not encrypted stays so
			more.sessions[sessionID] = struct{}{}
		}
	}
	r.doubt(more)
}

// noted is told of a message whose record has just been written: something may have changed between the verdict and that.
func (r *reviser) noted(rec *record) {
	if rec.verdict.SessionID == "" {
		return
	}
	more := nothingDoubted()
	more.messages[rec.eventID] = struct{}{}
	r.doubt(more)
}

func (r *reviser) doubt(more doubtedAnswers) {
	r.mu.Lock()
	r.pending.add(more)
	r.mu.Unlock()
	notify(r.wake)
}

// run corrects answers until the context ends. It begins with all of them, for what changed while no process was there.
func (r *reviser) run(ctx context.Context) {
	ctx = r.log.WithContext(ctx)
	var forgotten time.Time
	for ctx.Err() == nil {
		if _, ok := r.hold(ctx); !ok {
			return
		}
		next, err := r.round(ctx)
		if err != nil && ctx.Err() == nil {
			r.log.Err(err).Msg("Failed to correct answers, trying again")
			next = reviseRetry
		}
		if now := r.clock(); now.Sub(forgotten) > forgetEvery {
			forgotten = now
			if err = r.records.forget(ctx, now.Add(-answersStayTrue)); err != nil && ctx.Err() == nil {
				r.log.Err(err).Msg("Failed to forget old answers")
			}
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
		case <-r.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// round looks at what may have changed, says aloud what has become worse, and makes the edits for which it is time. It says how long
// there is nothing to do.
func (r *reviser) round(ctx context.Context) (next time.Duration, err error) {
	r.working.Lock()
	defer r.working.Unlock()
	doubted := r.take()
	changed, err := r.affected(ctx, doubted)
	if err == nil {
		err = r.reconsider(ctx, changed)
	}
	if err != nil {
		r.mu.Lock()
		r.pending.add(doubted)
		r.mu.Unlock()
		return 0, err
	}
	if err = r.editDue(ctx); err != nil {
		return 0, err
	}
	now := r.clock()
	due, err := r.records.nextDue(ctx, now)
	if err != nil {
		return 0, err
	}
	next = forgetEvery
	if !due.IsZero() {
		next = min(next, due.Sub(now))
	}
	return next, nil
}

func (r *reviser) take() doubtedAnswers {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := r.pending
	r.pending = nothingDoubted()
	return taken
}

// affected gives the answers that are doubted.
func (r *reviser) affected(ctx context.Context, doubted doubtedAnswers) ([]*record, error) {
	if doubted.everything {
		return r.records.list(ctx, getSinceQuery, r.clock().Add(-answersStayTrue).UnixMilli())
	}
	var all []*record
	seen := make(map[id.EventID]bool)
	collect := func(query string, key any) error {
		found, err := r.records.list(ctx, query, key)
		for _, rec := range found {
			if !seen[rec.eventID] {
				seen[rec.eventID] = true
				all = append(all, rec)
			}
		}
		return err
	}
	for userID := range doubted.users {
		if err := collect(getOfOwnerQuery, userID); err != nil {
			return nil, err
		}
	}
	for sessionID := range doubted.sessions {
		if err := collect(getOfSessionQuery, sessionID); err != nil {
			return nil, err
		}
	}
	for eventID := range doubted.messages {
		if err := collect(getRecordQuery, eventID); err != nil {
			return nil, err
		}
	}
	// The reaction to a message is about its edits as well.
	for _, rec := range all {
		if rec.editOf == "" {
			continue
		}
		if err := collect(getRecordQuery, rec.editOf); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// reconsider reviews the answers, notes which are to be corrected when, and says aloud what has become worse.
func (r *reviser) reconsider(ctx context.Context, candidates []*record) error {
	now := r.clock()
	newest := make(map[warning]*record)
	verdicts := make(map[id.EventID]cryptohook.Verdict)
	for _, rec := range candidates {
		if now.Sub(rec.toldAt) > answersStayTrue || rec.redactedBy != "" || rec.kind == kindCommand {
			continue
		}
		verdict, err := r.review(ctx, rec.verdict, rec.sender)
		if err != nil {
			return err
		}
		if err = r.plan(ctx, rec, verdict); err != nil {
			return err
		}
		if rec.answerID == "" || !worse(rec.verdict.Code, verdict.Code) {
			continue
		}
		key := warning{rec.roomID, rec.sender, verdict.Code, verdict.MasterKey}
		if known := newest[key]; known == nil || rec.toldAt.After(known.toldAt) {
			newest[key], verdicts[rec.eventID] = rec, verdict
		}
	}
	for key, rec := range newest {
		if err := r.warn(ctx, key, rec, verdicts[rec.eventID]); err != nil {
			return err
		}
	}
	return nil
}

// plan notes when an answer is to be corrected, or that it need not be after all.
func (r *reviser) plan(ctx context.Context, rec *record, verdict cryptohook.Verdict) error {
	if right, err := r.isRight(ctx, rec, verdict); err != nil {
		return err
	} else if right {
		return r.settle(ctx, rec, verdict)
	}
	due := r.clock()
	latest := due.Add(editPause) // later times are by a clock that was ahead
	if !rec.due.IsZero() && !rec.due.After(latest) {
		return nil
	}
	if earliest := rec.editedAt.Add(editPause); earliest.After(due) && !earliest.After(latest) {
		due = earliest
	}
	return r.records.setDue(ctx, rec, due)
}

// isRight says that what the room sees of a message is what it should.
func (r *reviser) isRight(ctx context.Context, rec *record, verdict cryptohook.Verdict) (bool, error) {
	switch {
	case rec.redactedBy != "":
		return false, nil
	case rec.kind == kindCommand:
		return true, nil
	case rec.kind == kindQuiet:
		speaks, err := r.speaksUp(ctx, rec, verdict)
		return !speaks, err
	case r.beingAnswered(rec):
		return true, nil
	case rec.kind == kindReaction:
		sign, err := r.signNow(ctx, rec, verdict)
		return sign == rec.sign && rec.nextSign == "", err
	}
	return r.same(rec, verdict), nil
}

// settle notes that what the room sees is right. What it does not see is noted as it is now.
func (r *reviser) settle(ctx context.Context, rec *record, verdict cryptohook.Verdict) error {
	if r.same(rec, verdict) || r.beingAnswered(rec) {
		return r.records.setDue(ctx, rec, time.Time{})
	}
	return r.records.setVerdict(ctx, rec, verdict)
}

// speaksUp says that a message about which the bot was quiet is worth a warning now.
func (r *reviser) speaksUp(ctx context.Context, rec *record, verdict cryptohook.Verdict) (bool, error) {
	if r.shield(verdict.Code) == cryptohook.ShieldNone || r.kindOf(rec.roomID, verdict) == kindQuiet {
		return false, nil
	}
	if rec.editOf == "" {
		return true, nil
	}
	told, err := r.alreadyTold(ctx, rec, verdict)
	return !told, err
}

// beingAnswered says that the answer is on its way. When it is there, it is reviewed.
func (r *reviser) beingAnswered(rec *record) bool { return rec.answerID == "" && rec.kind != kindQuiet }

// same says that the verdict would be told in the same words.
func (r *reviser) same(rec *record, verdict cryptohook.Verdict) bool {
	s := r.speech(rec.roomID)
	return r.annotate(rec.verdict) == r.annotate(verdict) && s.explain(rec.verdict, rec.sender) == s.explain(verdict, rec.sender)
}

// warn says aloud that what was told about somebody's messages has become worse: once a room, sender and kind within a day.
func (r *reviser) warn(ctx context.Context, w warning, newest *record, verdict cryptohook.Verdict) error {
	said, err := r.records.wasSaid(ctx, w)
	if err != nil || said {
		return err
	}
	// It is not the answer to an event, so it carries no annotation.
	content := noticeContent(r.speech(w.roomID).warnOf(newest.verdict, verdict, newest.sender), nil)
	eventID, sent := r.send(ctx, w.roomID, content, hashOf("warning", w.roomID, w.sender, w.code, w.masterKey))
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if sent {
		r.log.Info().Stringer("room_id", w.roomID).Stringer("sender", w.sender).Str("code", string(w.code)).Stringer("warning_id", eventID).
			Msg("Told a room that a sender's messages are worth less than it was told")
	}
	// What the homeserver refuses is not tried again either.
	return r.records.noteSaid(ctx, w, r.clock())
}

// editDue corrects the answers for which it is time, those that have become worse first.
func (r *reviser) editDue(ctx context.Context) error {
	now := r.clock()
	due, err := r.records.list(ctx, getDueQuery, now.UnixMilli(), dueAtOnce)
	if err != nil {
		return err
	}
	verdicts := make(map[id.EventID]cryptohook.Verdict, len(due))
	for _, rec := range due {
		if verdicts[rec.eventID], err = r.review(ctx, rec.verdict, rec.sender); err != nil {
			return err
		}
	}
	slices.SortStableFunc(due, func(a, b *record) int {
		return cmp.Compare(loss(b.verdict.Code, verdicts[b.eventID].Code), loss(a.verdict.Code, verdicts[a.eventID].Code))
	})
	for _, rec := range due {
		verdict := verdicts[rec.eventID]
		right, err := r.isRight(ctx, rec, verdict)
		switch {
		case err != nil:
		case right:
			err = r.settle(ctx, rec, verdict)
		case !r.mayEdit(rec.roomID):
			err = r.records.setDue(ctx, rec, now.Add(editPause))
		default:
			err = r.correct(ctx, rec, verdict)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// mayEdit counts an edit in a room, or says that there were enough for now.
func (r *reviser) mayEdit(roomID id.RoomID) bool {
	now := r.clock()
	recent := within(r.edited[roomID], now, editPause)
	if len(recent) >= r.editsPerRoom {
		r.edited[roomID] = recent
		r.metrics.reached(limitEditsPerRoom)
		return false
	}
	r.edited[roomID] = append(recent, now)
	return true
}

// correct edits an answer, gives it now that it is worth giving, or clears it.
func (r *reviser) correct(ctx context.Context, rec *record, verdict cryptohook.Verdict) error {
	if rec.redactedBy != "" {
		return r.clear(ctx, rec)
	}
	if rec.kind == kindQuiet {
		rec.kind = r.kindOf(rec.roomID, verdict)
	}
	if rec.kind == kindReaction {
		return r.correctReaction(ctx, rec, verdict)
	}
	log := r.log.With().Stringer("room_id", rec.roomID).Stringer("event_id", rec.eventID).
		Str("old_code", string(rec.verdict.Code)).Str("code", string(verdict.Code)).Logger()
	s := r.speech(rec.roomID)
	content := editContent(rec.answerID, s.correctedWords(rec, verdict), r.annotate(verdict))
	if rec.answerID == "" {
		content = answerContent(s.wordsOn(rec, verdict), r.annotate(verdict), replyTo(rec.about(), rec.threadID))
	}
	// The words are part of it: if they change between a crash and the next try, that is another event.
	raw, err := json.Marshal(content)
	if err != nil {
		return fmt.Errorf("failed to marshal an answer: %w", err)
	}
	eventID, sent := r.send(log.WithContext(ctx), rec.roomID, content, hashOf("edit", rec.eventID, rec.edits, string(raw)))
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !sent {
		return r.records.exec(ctx, deleteRecordQuery, rec.eventID)
	}
	r.metrics.edits.Inc()
	log.Info().Stringer("edit_id", eventID).Msg("Corrected an answer")
	if rec.answerID == "" {
		rec.answerID = eventID
	} else {
		rec.edits++
	}
	rec.editedAt = r.clock()
	return r.records.setVerdict(ctx, rec, verdict)
}

// correctLate edits the answer to a message whose key has come late, at once. It says no when the message was never answered.
func (r *reviser) correctLate(ctx context.Context, evt *event.Event, verdict cryptohook.Verdict) (answered bool, err error) {
	r.working.Lock()
	defer r.working.Unlock()
	rec, err := r.records.get(ctx, evt.ID)
	if err != nil || rec == nil || rec.answerID == "" {
		return false, err
	}
	if right, err := r.isRight(ctx, rec, verdict); err != nil {
		return false, err
	} else if right {
		return true, r.settle(ctx, rec, verdict)
	}
	return true, r.correct(ctx, rec, verdict)
}

// forgetRoom drops the answers in a room that the bot has left.
func (r *reviser) forgetRoom(ctx context.Context, roomID id.RoomID) error {
	return r.records.exec(ctx, forgetRoomQuery, roomID)
}

// fromBest orders the codes by what a message is worth.
var fromBest = []cryptohook.Code{
	cryptohook.CodeVerified, cryptohook.CodeUnverifiedIdentity, cryptohook.CodeNotEncrypted,
	cryptohook.CodeIdentityChanged, cryptohook.CodeAuthenticityNotGuaranteed,
	cryptohook.CodeUnsignedDevice, cryptohook.CodeUnknownDevice, cryptohook.CodeUnableToDecrypt, cryptohook.CodeSentInClear,
	cryptohook.CodeVerificationViolation, cryptohook.CodeSessionConflict, cryptohook.CodeMismatchedSender, cryptohook.CodeSessionRejected,
}

// loss is by how much a message is worth less now than it was; below zero it is worth more. What could not be read was worth nothing.
func loss(before, now cryptohook.Code) int {
	if before == cryptohook.CodeUnableToDecrypt {
		return 0
	}
	return slices.Index(fromBest, now) - slices.Index(fromBest, before)
}

func worse(before, now cryptohook.Code) bool { return loss(before, now) > 0 }

// hashOf makes a request's transaction ID from what makes it the same request.
func hashOf(parts ...any) string {
	text, err := json.Marshal(parts)
	if err != nil {
		text = fmt.Append(nil, parts...)
	}
	hash := sha256.Sum256(text)
	return "sendertrust-" + hex.EncodeToString(hash[:16])
}
