package bot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// How the bot answers in a room: as its configuration says (annotate.mode), or as it was told there, by a state event or by a command.
// What it was told last counts.

// stateMode is the state event by which a room says how the bot is to answer in it: {"mode": "warnings"}, with the state key "". Without a
// mode it is the configuration's again. The homeserver lets only those send it who have the power level for it.
var stateMode = event.Type{Type: "dev.sendertrust.mode", Class: event.StateEventType}

// modeDefault is what the command calls the configuration's mode.
const modeDefault = "default"

// mode is how the bot answers in a room: one of [Modes].
func (b *Bot) mode(roomID id.RoomID) string {
	if mode := b.modes.of(roomID).mode; mode != "" {
		return mode
	}
	return b.config.Annotate.Mode
}

// kindOf is how a message is answered that nobody asks about.
func (b *Bot) kindOf(roomID id.RoomID, v cryptohook.Verdict) answerKind {
	switch b.mode(roomID) {
	case ModeCommand:
		return kindQuiet
	case ModeWarnings:
		if b.shield(v.Code) == cryptohook.ShieldNone {
			return kindQuiet
		}
	case ModeReaction:
		// That a room is not encrypted is not about one message, and is said once.
		if v.Code != cryptohook.CodeNotEncrypted {
			return kindReaction
		}
	}
	return kindReply
}

// sign is the reaction to a message. Who sees ℹ️ is told nothing wrong: it warns of nothing, and promises nothing.
func (b *Bot) sign(v cryptohook.Verdict) string {
	switch shield := b.shield(v.Code); {
	case v.Code == cryptohook.CodeVerified:
		return signVerified
	case shield == cryptohook.ShieldNone:
		return signPlain
	case shield == cryptohook.ShieldGrey:
		return signCaution
	default:
		return signWarning
	}
}

// roomModes are the modes of the rooms that were told one, in memory and in the database. Nil: there are none.
type roomModes struct {
	records *records

	mu    sync.RWMutex
	rooms map[id.RoomID]roomMode
}

// roomMode is what a room was told last.
type roomMode struct {
	roomID id.RoomID
	// mode is one of [Modes]; empty: as the configuration says.
	mode string
	// stateEvent is the last state event that was taken for it: the homeserver may show it again.
	stateEvent id.EventID
}

const (
	getModesQuery   = `SELECT room_id, mode, state_event FROM bot_mode WHERE room_id>''`
	putModeQuery    = `INSERT INTO bot_mode (room_id, mode, state_event) VALUES ($1, $2, $3) ON CONFLICT (room_id) DO UPDATE SET mode=excluded.mode, state_event=excluded.state_event`
	deleteModeQuery = `DELETE FROM bot_mode WHERE room_id=$1`
)

// loadModes reads what rooms have told the process before this one.
func (b *Bot) loadModes(ctx context.Context) error {
	rows, err := b.reviser.records.Query(ctx, getModesQuery)
	list, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (m roomMode, err error) {
		return m, row.Scan(&m.roomID, &m.mode, &m.stateEvent)
	}, err).AsList()
	if err != nil {
		return fmt.Errorf("failed to read how rooms are answered: %w", err)
	}
	b.modes = &roomModes{records: b.reviser.records, rooms: make(map[id.RoomID]roomMode, len(list))}
	for _, m := range list {
		b.modes.rooms[m.roomID] = m
	}
	return nil
}

func (m *roomModes) of(roomID id.RoomID) roomMode {
	if m == nil {
		return roomMode{}
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.rooms[roomID]
}

// told says whether a room was told something, be it only to do as the configuration says.
func (m *roomModes) told(roomID id.RoomID) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	_, told := m.rooms[roomID]
	return told
}

func (m *roomModes) set(ctx context.Context, room roomMode) error {
	if err := m.records.exec(ctx, putModeQuery, room.roomID, room.mode, room.stateEvent); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rooms[room.roomID] = room
	return nil
}

func (m *roomModes) forget(ctx context.Context, roomID id.RoomID) error {
	m.mu.Lock()
	delete(m.rooms, roomID)
	m.mu.Unlock()
	return m.records.exec(ctx, deleteModeQuery, roomID)
}

// forgetRoom drops what is kept of a room that the bot has left.
func (b *Bot) forgetRoom(ctx context.Context, roomID id.RoomID) error {
	return errors.Join(b.reviser.forgetRoom(ctx, roomID), b.modes.forget(ctx, roomID))
}

// handleMode takes the mode from a room's state. One that the bot has sent itself says nothing new, unless its database is.
func (b *Bot) handleMode(ctx context.Context, evt *event.Event) {
	if evt.GetStateKey() != "" || evt.Mautrix.EventSource&event.SourceJoin == 0 || evt.Mautrix.IgnoreState {
		return
	}
	log := b.log.With().Stringer("room_id", evt.RoomID).Stringer("event_id", evt.ID).Stringer("sender", evt.Sender).Logger()
	mode, known := modeIn(evt)
	if !known {
		log.Warn().Msg("Ignoring a state event that tells the bot to answer in a way that it does not know")
		return
	}
	if b.modes.of(evt.RoomID).stateEvent == evt.ID || evt.Sender == b.client.UserID && b.modes.told(evt.RoomID) {
		return
	}
	if err := b.modes.set(ctx, roomMode{evt.RoomID, mode, evt.ID}); err != nil {
		log.Err(err).Msg("Failed to note how a room is to be answered")
		return
	}
	log.Info().Str("mode", b.mode(evt.RoomID)).Msg("A room's state says how the bot is to answer in it")
}

// modeIn reads a state event. An empty mode is the configuration's.
func modeIn(evt *event.Event) (mode string, known bool) {
	value, there := evt.Content.Raw["mode"]
	if !there {
		return "", true
	}
	mode, _ = value.(string)
	return mode, slices.Contains(Modes, mode)
}

// orderMode tells how the bot answers in the room, or changes it.
func (b *Bot) orderMode(ctx context.Context, o *order) response {
	if len(o.args) == 0 {
		return say(b.describeMode(o))
	}
	mode := strings.ToLower(o.args[0])
	if mode != modeDefault && !slices.Contains(Modes, mode) {
		return refuse(o.speech.text(signCaution, "mode.unknown", vars{"Given": showText(o.args[0]), "Modes": strings.Join(Modes, ", ")}), "unknown mode")
	}
	if mode == modeDefault {
		mode = ""
	}
	if why := b.mayNotSetMode(ctx, o); why != "" {
		r := refuse(b.refuseMode(o, why), why)
		b.note(ctx, o, r)
		return r
	}
	if err := b.reviser.records.putAudit(ctx, b.lineOf(o, auditBegun, "")); err != nil {
		return o.failed(ctx, err)
	}
	r := b.setMode(ctx, o, mode)
	b.note(ctx, o, r)
	return r
}

// setMode has the bot answer in another way from now on, and writes that into the room's state if it may.
func (b *Bot) setMode(ctx context.Context, o *order, mode string) response {
	if err := b.modes.set(ctx, roomMode{o.evt.RoomID, mode, b.modes.of(o.evt.RoomID).stateEvent}); err != nil {
		return o.failed(ctx, err)
	}
	log := zerolog.Ctx(ctx)
	log.Info().Str("mode", b.mode(o.evt.RoomID)).Msg("Answering a room in another way")
	if may, err := b.maySendMode(ctx, o.evt.RoomID, b.client.UserID); err != nil {
		log.Err(err).Msg("Failed to look up whether the bot may write into the room's state")
	} else if may {
		b.publishMode(ctx, o.evt.RoomID, mode)
	}
	key := "mode.set_" + b.mode(o.evt.RoomID)
	return say(o.speech.text(signPlain, key, nil))
}

// publishMode writes the mode into the room's state, for people and other programs to see. That it fails does no harm.
func (b *Bot) publishMode(ctx context.Context, roomID id.RoomID, mode string) {
	content := make(map[string]any)
	if mode != "" {
		content["mode"] = mode
	}
	if _, err := b.client.SendStateEvent(ctx, roomID, stateMode, "", content); err != nil {
		zerolog.Ctx(ctx).Warn().Err(err).Msg("Failed to write into the room's state how the bot answers")
	}
}

// describeMode words how the bot answers in a room, why, and who may change it.
func (b *Bot) describeMode(o *order) text {
	from := "mode.from_config"
	if b.modes.of(o.evt.RoomID).mode != "" {
		from = "mode.from_room"
	}
	who := "mode.who"
	if o.verdict.Code == cryptohook.CodeNotEncrypted {
		who = "mode.who_not_encrypted"
	}
	put := vars{"Modes": strings.Join(Modes, ", "), "Type": stateMode.Type}
	said := o.speech.text(signPlain, "mode.now_"+b.mode(o.evt.RoomID), put)
	said.remark(o.speech.phrase(from, put))
	said.advice = o.speech.phrase(who, put)
	return said
}

// Why somebody may not change how the bot answers, besides the reasons that keep an operator's command from being one.
const (
	whyNotModerator = "not_moderator"
	whyNotProven    = "not_proven"
	whyNotEncrypted = "not_encrypted"
)

// mayNotSetMode says why an order does not change how the bot answers; empty: it does. Operators may change it, and whoever has the power
// to send the state event. A moderator cannot be asked to be verified, but what anybody could have written does not count. Where nothing is
// encrypted, the state event is all there is: that one the homeserver checks.
func (b *Bot) mayNotSetMode(ctx context.Context, o *order) string {
	if o.verdict.Code == cryptohook.CodeNotEncrypted {
		return whyNotEncrypted
	}
	if slices.Contains(b.config.Trust.Operators, o.evt.Sender) && b.withoutAuthority(ctx, o) == "" {
		return ""
	}
	may, err := b.maySendMode(ctx, o.evt.RoomID, o.evt.Sender)
	switch {
	case err != nil:
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look up what somebody may do in the room")
		return whyNotSure
	case !may:
		return whyNotModerator
	case o.verdict.Late:
		return whyLate
	}
	return b.notProven(ctx, o)
}

// notProven says why it is not proven who gave an order, though nobody need have verified them; empty: it is.
func (b *Bot) notProven(ctx context.Context, o *order) string {
	now, err := b.reviser.review(ctx, o.verdict, o.evt.Sender)
	if err != nil {
		zerolog.Ctx(ctx).Err(err).Msg("Failed to look at the verdict on a command again")
		return whyNotSure
	}
	switch {
	case !b.proves(o.verdict, o.evt.Sender):
		return whyNotProven
	case !b.proves(now, o.evt.Sender):
		o.verdict = now
		return whyNotProven
	case now.Outdated || o.verdict.Outdated:
		return whyNotSure
	}
	return ""
}

// proves says that a message is its sender's, and that nothing about it is worth a red warning.
func (b *Bot) proves(v cryptohook.Verdict, sender id.UserID) bool {
	proven := v.Code == cryptohook.CodeVerified || v.Code == cryptohook.CodeUnverifiedIdentity
	return proven && v.UserID == sender && b.shield(v.Code) != cryptohook.ShieldRed
}

// maySendMode says whether the room's power levels let somebody who is in it send the state event.
// https://spec.matrix.org/v1.16/client-server-api/#mroompower_levels
func (b *Bot) maySendMode(ctx context.Context, roomID id.RoomID, userID id.UserID) (bool, error) {
	member, err := b.client.StateStore.TryGetMember(ctx, roomID, userID)
	if err != nil || member == nil || member.Membership != event.MembershipJoin {
		return false, err
	}
	levels, err := b.client.StateStore.GetPowerLevels(ctx, roomID)
	if err != nil || levels == nil {
		return false, err
	}
	return levels.GetUserLevel(userID) >= levels.GetEventLevel(stateMode), nil
}

// refuseMode words why the mode stays as it is.
func (b *Bot) refuseMode(o *order, why string) text {
	key := "mode." + why
	if !o.speech.has(key + ".headline") {
		return b.refusal(o, why)
	}
	return o.speech.text(signWarning, key, vars{
		"Name": showUser(o.evt.Sender), "Headline": o.speech.explain(o.verdict, o.evt.Sender).headline, "Type": stateMode.Type,
	})
}
