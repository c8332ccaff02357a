package soak

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"testing"

	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/people"
	"sendertrust/e2e/proxy"
)

// keyFields are the parts of a key query's answer that have an entry for each user.
var keyFields = []string{"device_keys", "master_keys", "self_signing_keys"}

// editQuery has a hook change what key queries say of a person.
func (s *scene) editQuery(person *people.Person, tell func(answer map[string]any)) *proxy.Hook {
	return s.OnAnswer(proxy.KeysQuery, 0, func(request *proxy.Request, answer *proxy.Answer) bool {
		return askedAbout(request, person) && proxy.Edit(func(answer map[string]any) bool {
			tell(answer)
			return true
		})(request, answer)
	})
}

// inventDevices has the homeserver list a device that the person never had, and send messages in its name: one that nobody has signed,
// and one with a signature that is made up.
func inventDevices(t *testing.T, l *liar) {
	s := l.scene(t, "devices invented", "flagged: unsigned_device, session_rejected")
	for range often(1, 3) {
		person := <-l.pinned
		s.enter(person)
		s.hears(s.says(person, true, "verified"))
		for _, forged := range []bool{false, true} {
			s.tries++
			invented := must(people.Login(within(t, patience), l.w.server.URL, person.UserID.String(), password, people.Options{Unpublished: true}))(t)
			t.Cleanup(invented.Close)
			payload := must(invented.OlmPayload(&people.Device{}, "m.dummy", nil))(t)
			keys, code := object(payload, "sender_device_keys"), "unsigned_device"
			if forged {
				object(keys, "signatures", person.UserID.String())["ed25519:"+person.SelfSigningKey().String()] = randomSignature()
				code = "session_rejected"
			}
			told := s.editQuery(person, func(answer map[string]any) {
				object(answer, "device_keys", person.UserID.String())[invented.DeviceID.String()] = keys
			})
			s.askAbout(told, person)
			ok(t, invented.WaitJoined(within(t, patience), s.room, l.bot.UserID))
			session := must(invented.NewSession(s.room))(t)
			ok(t, invented.ShareKey(within(t, patience), session, l.bot.UserID, people.OmitDeviceKeys()))
			said := s.expect(person, must(invented.SendWith(within(t, patience), session, say("invented")))(t), code)
			s.hears(said, s.says(person, true, "verified"))
			told.Remove()
		}
	}
	s.finish()
}

// enter brings somebody into the scene's room.
func (s *scene) enter(person *people.Person) {
	s.t.Helper()
	ctx := within(s.t, patience)
	ok(s.t, s.stranger.Invite(ctx, s.room, person.UserID))
	ok(s.t, person.Join(ctx, s.room))
	ok(s.t, person.WaitJoined(ctx, s.room, s.bot.UserID))
	for _, member := range []*people.Person{s.verified, s.stranger} {
		ok(s.t, member.WaitJoined(ctx, s.room, person.UserID))
	}
}

func randomSignature() string {
	raw := make([]byte, 64)
	rand.Read(raw) // never fails (Go 1.24)
	raw[63] &= 0x0f
	return base64.RawStdEncoding.EncodeToString(raw)
}

// answerUnasked puts another identity of a person, and no devices, into the answers about others.
func answerUnasked(t *testing.T, l *liar) {
	person := l.w.newStranger(t, "unasked")
	s := l.scene(t, "answers unasked", "refused", person)
	s.hears(s.says(person, true, "unverified_identity"))
	forged := must(olm.NewPKSigning())(t)
	master := map[string]any{
		"user_id": person.UserID, "usage": []string{string(id.XSUsageMaster)},
		"keys": map[string]any{"ed25519:" + forged.PublicKey().String(): forged.PublicKey()},
	}
	told := s.OnAnswer(proxy.KeysQuery, 0, func(request *proxy.Request, answer *proxy.Answer) bool {
		return !askedAbout(request, person) && proxy.Edit(func(answer map[string]any) bool {
			object(answer, "device_keys")[person.UserID.String()] = map[string]any{}
			object(answer, "master_keys")[person.UserID.String()] = master
			return true
		})(request, answer)
	})
	for range often(1, 3) {
		s.tries++
		s.askAbout(told, s.stranger)
		s.hears(s.says(person, false, "unverified_identity"), s.says(person, true, "unverified_identity"))
	}
	told.Remove()
	s.finish()
}

// hideChanges drops the news that a verified person's keys have changed. What the bot has still looks right to it; what comes with keys
// that it does not know does not.
func hideChanges(t *testing.T, l *liar) {
	s := l.scene(t, "identity changes hidden", "withheld: seen at the first message with a new key; before that it cannot be seen")
	for range often(1, 3) {
		person := <-l.pinned
		s.enter(person)
		s.hears(s.forNow(s.says(person, true, "verified"))...)
		told := s.OnAnswer(proxy.Sync, 0, proxy.Edit(func(sync map[string]any) bool {
			lists := object(sync, "device_lists")
			changed, _ := lists["changed"].([]any)
			kept := make([]any, 0, len(changed))
			for _, user := range changed {
				if user != person.UserID.String() {
					kept = append(kept, user)
				}
			}
			lists["changed"] = kept
			return len(kept) < len(changed)
		}))
		s.tries++
		thief := must(people.Login(within(t, patience), l.w.server.URL, person.UserID.String(), password, people.Options{}))(t)
		t.Cleanup(thief.Close)
		must(thief.ResetIdentity(within(t, patience)))(t)
		ok(t, told.Wait(within(t, patience), 1))
		// Nothing that the bot has seen tells it.
		s.hears(s.forNow(s.says(person, false, "verified"))...)
		ok(t, thief.WaitJoined(within(t, patience), s.room, l.bot.UserID))
		said := must(thief.Send(within(t, patience), s.room, say("it is me")))(t)
		s.hears(s.forNow(s.expect(s.stranger, said, "unsigned_device"))...)
		// It asks about the device that it does not know, and learns it all.
		must(s.stranger.WaitForAnswerThat(within(t, patience), said, func(answer people.Answer) bool {
			return s.byBot(answer) && answer.Annotation.Code == "verification_violation"
		}))(t)
		s.hears(s.forNow(s.says(person, true, "unsigned_device"))...)
		told.Remove()
	}
	s.finish()
}

// rollBack shows an older identity again after somebody has replaced it: the one that was pinned. It is what the operator has verified, and
// what it has signed is as good as ever: that it was replaced in between cannot be told from its owner's having it restored. What the
// other identity has signed is never taken for it.
func rollBack(t *testing.T, l *liar) {
	s := l.scene(t, "identities rolled back", "cannot be seen of what the older identity signed; the other one's devices stay flagged")
	for range often(1, 3) {
		person := <-l.pinned
		kept := make(map[string]json.RawMessage)
		keep := s.OnAnswer(proxy.KeysQuery, 0, func(request *proxy.Request, answer *proxy.Answer) bool {
			var whole map[string]map[string]json.RawMessage
			if !askedAbout(request, person) || json.Unmarshal(answer.Body, &whole) != nil {
				return false
			}
			for _, field := range keyFields {
				kept[field] = whole[field][person.UserID.String()]
			}
			return true
		})
		s.enter(person)
		s.askAbout(keep, person)
		s.hears(s.forNow(s.says(person, true, "verified"))...)
		keep.Remove()

		thief := must(people.Login(within(t, patience), l.w.server.URL, person.UserID.String(), password, people.Options{}))(t)
		t.Cleanup(thief.Close)
		must(thief.ResetIdentity(within(t, patience)))(t)
		ok(t, thief.WaitJoined(within(t, patience), s.room, l.bot.UserID))
		byThief := func(fresh bool, code string) message {
			if fresh {
				thief.RotateSession(s.room)
			}
			return s.forNow(s.expect(s.stranger, must(thief.Send(within(t, patience), s.room, say("it is me")))(t), code))[0]
		}
		s.hears(byThief(true, "verification_violation"))
		told := s.editQuery(person, func(answer map[string]any) {
			for field, value := range kept {
				object(answer, field)[person.UserID.String()] = value
			}
		})
		s.tries++
		s.askAbout(told, person)
		s.hears(byThief(false, "identity_changed"), byThief(true, "unsigned_device"))
		s.hears(s.forNow(s.says(person, true, "verified"))...)
		told.Remove()
	}
	s.finish()
}
