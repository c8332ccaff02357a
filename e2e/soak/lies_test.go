package soak

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"testing"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/people"
	"sendertrust/e2e/proxy"
)

// usersIn gives whom a key query asks about.
func usersIn(request *proxy.Request) (users []id.UserID) {
	var asked mautrix.ReqQueryKeys
	if json.Unmarshal(request.Body, &asked) != nil {
		return nil
	}
	return slices.Collect(maps.Keys(asked.DeviceKeys))
}

// pinnedForLies is how many people the lies about somebody's keys take.
func pinnedForLies() int { return 4 * often(1, 3) }

// The homeserver lies to the bot in every way in which it can, while people talk. What is said of a message is never better than what is
// proven; where a lie cannot be seen, what is said is still true of what the bot was shown. docs/security.md names those.
func TestLies(t *testing.T) {
	t.Parallel()
	l := newLiar(t, theWorld(t), pinnedForLies())
	for name, play := range map[string]func(t *testing.T, l *liar){
		"events under another's name":        lieAboutSenders,
		"event IDs exchanged":                lieAboutEventIDs,
		"events in the wrong room":           lieAboutRooms,
		"events in another order":            lieAboutOrder,
		"room keys dropped":                  dropRoomKeys,
		"to-device messages repeated":        repeatToDevice,
		"encryption claimed away":            claimEncryptionAway,
		"encryption hidden from the start":   hideEncryption,
		"devices invented":                   inventDevices,
		"answers about people not asked for": answerUnasked,
		"identity changes hidden":            hideChanges,
		"identities rolled back":             rollBack,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			play(t, l)
		})
	}
}

// lieAboutSenders gives the verified person's messages the stranger's name, and the other way round.
func lieAboutSenders(t *testing.T, l *liar) {
	s := l.scene(t, "another sender", "flagged: mismatched_sender")
	s.honestly()
	told := s.messagesIn(func(_ map[string]any, messages []map[string]any) []map[string]any {
		for _, evt := range messages {
			if evt["sender"] == s.verified.UserID.String() {
				evt["sender"] = s.stranger.UserID.String()
			} else {
				evt["sender"] = s.verified.UserID.String()
			}
		}
		return messages
	})
	for n := range often(2, 6) {
		s.hears(s.says(s.verified, n%2 == 0, "mismatched_sender"), s.says(s.stranger, n%2 == 0, "mismatched_sender"))
	}
	s.end(told)
	s.finish()
}

// lieAboutEventIDs gives two people's messages each other's event IDs: the bot's answer is about another message than the one that people
// see it under. Nothing in a message is bound to its ID. The answer names whose message it is about, and in which session.
func lieAboutEventIDs(t *testing.T, l *liar) {
	s := l.scene(t, "event IDs exchanged", "cannot be seen; the answer names whose message it was shown")
	s.honestly()
	told := s.holdUntil(2, func(all []map[string]any) {
		all[0]["event_id"], all[1]["event_id"] = all[1]["event_id"], all[0]["event_id"]
	})
	for range often(1, 4) {
		s.tries++
		mine, theirs := s.says(s.verified, true, "unverified_identity"), s.says(s.stranger, true, "verified")
		answers := s.hears(mine, theirs)
		for i, owner := range []*people.Person{s.stranger, s.verified} {
			session := must(owner.CurrentSession(within(t, patience), s.room))(t)
			if about := answers[i].Annotation; about.UserID != owner.UserID || about.SessionID != session.ID {
				t.Errorf("the answer does not name whose message it is about: %+v", about)
				s.wrong++
			}
		}
	}
	told.Remove()
	s.finish()
}

// lieAboutRooms shows messages in another room than the one that they were written for.
func lieAboutRooms(t *testing.T, l *liar) {
	s := l.scene(t, "wrong room", "refused: not decrypted, unable_to_decrypt")
	s.honestly()
	elsewhere := s.newRoom()
	told := s.messagesIn(func(sync map[string]any, messages []map[string]any) []map[string]any {
		putTimeline(sync, elsewhere, append(timelineOf(sync, elsewhere), messages...))
		return nil
	})
	var moved []message
	for range often(1, 3) {
		moved = append(moved, s.says(s.verified, true, "unable_to_decrypt"), s.says(s.stranger, false, "unable_to_decrypt"))
	}
	for i, answer := range s.hears(moved...) {
		if answer.RoomID != elsewhere {
			t.Errorf("message %d was answered in %s, not where it was shown", i, answer.RoomID)
			s.wrong++
		}
	}
	s.end(told)
	s.finish()
}

// lieAboutOrder gives messages the other way round. Each is judged for itself.
func lieAboutOrder(t *testing.T, l *liar) {
	s := l.scene(t, "another order", "cannot be seen, and changes nothing")
	s.honestly()
	told := s.holdUntil(4, slices.Reverse)
	for range often(1, 4) {
		s.tries++
		s.hears(s.says(s.verified, true, "verified"), s.says(s.stranger, false, "unverified_identity"),
			s.says(s.verified, false, "verified"), s.says(s.stranger, true, "unverified_identity"))
	}
	told.Remove()
	s.finish()
}

// dropRoomKeys drops all that a person sends to the bot's device.
func dropRoomKeys(t *testing.T, l *liar) {
	dropped := l.w.newStranger(t, "dropped")
	s := l.scene(t, "room keys dropped", "withheld: unable_to_decrypt; others are not held up", dropped)
	s.hears(s.says(dropped, true, "unverified_identity"))
	told := s.OnAnswer(proxy.Sync, 0, proxy.Edit(toDeviceOf(dropped, func([]any) []any { return nil })))
	var silent []message
	for range often(1, 3) {
		silent = append(silent, s.says(dropped, true, "unable_to_decrypt"))
		s.honestly()
	}
	s.hears(silent...)
	s.end(told)
	s.hears(s.says(dropped, true, "unverified_identity"))
	s.finish()
}

// repeatToDevice gives every message to the bot's device again, in every later /sync.
func repeatToDevice(t *testing.T, l *liar) {
	repeated := l.w.newStranger(t, "repeated")
	s := l.scene(t, "to-device repeated", "refused as repetitions", repeated)
	var kept []any
	told := s.OnAnswer(proxy.Sync, 0, proxy.Edit(func(sync map[string]any) bool {
		toDevice := object(sync, "to_device")
		events, _ := toDevice["events"].([]any)
		toDevice["events"] = append(slices.Clone(kept), events...)
		for _, evt := range events {
			if evt.(map[string]any)["sender"] == repeated.UserID.String() {
				kept = append(kept, evt)
			}
		}
		return len(kept) > 0
	}))
	for range often(3, 8) {
		s.hears(s.says(repeated, true, "unverified_identity"), s.says(repeated, false, "unverified_identity"))
	}
	s.honestly()
	s.end(told)
	s.finish()
}

// toDeviceOf makes a hook of what becomes of a person's encrypted messages to the bot's device.
func toDeviceOf(person *people.Person, tell func(events []any) []any) func(sync map[string]any) bool {
	return func(sync map[string]any) bool {
		toDevice := object(sync, "to_device")
		events, _ := toDevice["events"].([]any)
		var theirs, others []any
		for _, evt := range events {
			if evt.(map[string]any)["sender"] == person.UserID.String() {
				theirs = append(theirs, evt)
			} else {
				others = append(others, evt)
			}
		}
		if len(theirs) == 0 {
			return false
		}
		toDevice["events"] = append(others, tell(theirs)...)
		return true
	}
}

// The homeserver gives each answer of /sync that brings something of the room once more.
func TestRepeatedSyncs(t *testing.T) {
	t.Parallel()
	l := newLiar(t, theWorld(t), 0)
	s := l.scene(t, "/sync repeated", "answered once")
	repeats := s.Repeat(proxy.Sync, 0, func(answer *proxy.Answer) bool {
		var sync map[string]any
		return json.Unmarshal(answer.Body, &sync) == nil && len(timelineOf(sync, s.room)) > 0
	})
	for range often(2, 6) {
		s.honestly()
	}
	s.tries = repeats.Used()
	repeats.Remove()
	s.finish()
}

// claimEncryptionAway tells the bot that the room is encrypted no longer, in several ways.
func claimEncryptionAway(t *testing.T, l *liar) {
	s := l.scene(t, "encryption claimed away", "refused: sent_in_clear")
	s.honestly()
	for n := range often(2, 6) {
		content := []map[string]any{{}, {"algorithm": "m.none"}, {"algorithm": 7}}[n%3]
		told := s.OnAnswer(proxy.Sync, 1, proxy.Edit(func(sync map[string]any) bool {
			claim := map[string]any{
				"type": "m.room.encryption", "state_key": "", "sender": s.stranger.UserID.String(), "content": content,
				"event_id": fmt.Sprintf("$switched-off-%d", n), "origin_server_ts": 1,
			}
			object(sync, "rooms", "join", s.room.String(), "state")["events"] = []any{claim}
			putTimeline(sync, s.room, append([]map[string]any{claim}, timelineOf(sync, s.room)...))
			return true
		}))
		s.nudge(t)
		ok(t, told.Wait(within(t, patience), 1))
		s.tries++
		clear := must(s.stranger.SendClear(within(t, patience), s.room, say("in the clear")))(t)
		s.hears(s.expect(s.stranger, clear, "sent_in_clear"), s.says(s.verified, true, "verified"))
	}
	s.finish()
}

// hideEncryption never tells the bot that a room is encrypted. Then the bot says that it is not, and answers in the clear; who sent what
// was encrypted all the same is judged as ever.
func hideEncryption(t *testing.T, l *liar) {
	r := result{part: "lies", what: "encryption hidden", note: "cannot be seen: not_encrypted, never better"}
	ctx := within(t, patience)
	// The state event comes with the invitation, and again when the bot joins. Nobody else makes rooms in the verified person's name.
	told := l.OnAnswer(proxy.Sync, 0, proxy.Edit(func(sync map[string]any) bool {
		hidden := false
		for _, rooms := range []string{"join", "invite"} {
			for roomID := range object(sync, "rooms", rooms) {
				for _, part := range []string{"state", "timeline", "invite_state"} {
					events := object(sync, "rooms", rooms, roomID, part)
					list, _ := events["events"].([]any)
					events["events"] = slices.DeleteFunc(list, func(item any) bool {
						evt := item.(map[string]any)
						hide := evt["type"] == "m.room.encryption" && evt["sender"] == l.verified.UserID.String()
						hidden = hidden || hide
						return hide
					})
				}
			}
		}
		return hidden
	}))
	defer told.Remove()
	host := l.verified
	for range often(1, 3) {
		r.tries++
		room := l.w.newRoom(t, host, l.bot.UserID)
		ok(t, host.WaitJoined(ctx, room, l.bot.UserID))
		clear := must(host.SendClear(ctx, room, say("in the clear")))(t)
		encrypted := must(host.Send(ctx, room, say("encrypted")))(t)
		for eventID, code := range map[id.EventID]string{clear: "not_encrypted", encrypted: "verified"} {
			r.messages++
			answer := must(host.WaitForAnswer(ctx, eventID))(t)
			if answer.Annotation.Code != code || answer.Encrypted {
				t.Errorf("said %s (encrypted: %v), want %s in the clear", answer.Annotation.Code, answer.Encrypted, code)
				r.wrong++
				continue
			}
			r.held++
		}
	}
	check(t, r)
}
