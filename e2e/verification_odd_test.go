package e2e

import (
	"maps"
	"strings"
	"testing"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// visitor brings somebody with a cross-signing identity into the room.
func (r *registry) visitor(t *testing.T, name string) (*people.Person, id.Ed25519) {
	t.Helper()
	person, masterKey := theWorld(t).newStranger(t, name)
	r.admit(t, person)
	return person, masterKey
}

func (r *registry) admit(t *testing.T, person *people.Person) {
	t.Helper()
	ctx := within(t, patience)
	ok(t, r.olga.Invite(ctx, r.room, person.UserID))
	ok(t, person.Join(ctx, r.room))
	ok(t, person.WaitJoined(ctx, r.room, r.bot.UserID))
	ok(t, r.olga.WaitJoined(ctx, r.room, person.UserID))
}

// cancelled waits until the bot has ended a verification, and compares the reason.
func (r *registry) cancelled(t *testing.T, person *people.Person, verification id.VerificationTransactionID, code event.VerificationCancelCode) {
	t.Helper()
	content := must(person.WaitForVerificationEvent(within(t, patience), r.bot.UserID, verification, "cancel"))(t)
	if content["code"] != string(code) || content["reason"] == "" {
		t.Errorf("ended with %v, not with %s", content, code)
	}
}

// standing is what the bot says of a person's messages now.
func (r *registry) standing(t *testing.T, person *people.Person) string {
	t.Helper()
	ctx := within(t, patience)
	return must(r.olga.WaitForAnswer(ctx, must(person.Send(ctx, r.room, say("and now?")))(t)))(t).Annotation.Code
}

func TestHonestPersonIsVerified(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	alice, masterKey := r.visitor(t, "alice")
	ctx := within(t, 2*patience)
	verification := must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	ok(t, verification.Reach(ctx))
	r.notice(t, "Does the app of "+alice.UserID.String())
	ok(t, verification.Send(ctx, "mac", must(verification.Vouch(verification.OwnKeys(masterKey)))(t)))
	r.order(t, r.confirm(t, alice.UserID), "is verified now")
	if code := r.standing(t, alice); code != "verified" {
		t.Errorf("after it, alice is %s", code)
	}
}

// What a person's app vouches for after an operator has confirmed, or before.
func TestAppThatVouchesForTheWrongKeysVerifiesNobody(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	other := strings.Repeat("A", 43)
	cases := map[string]struct {
		vouch func(verification *people.Verification, alice *people.Person, masterKey id.Ed25519) map[id.KeyID]string
		spoil func(content map[string]any)
		code  event.VerificationCancelCode
		says  string
	}{
		"the device alone": {
			vouch: func(verification *people.Verification, alice *people.Person, masterKey id.Ed25519) map[id.KeyID]string {
				keys := verification.OwnKeys(masterKey)
				delete(keys, id.NewKeyID(id.KeyAlgorithmEd25519, masterKey.String()))
				return keys
			},
			code: event.VerificationCancelCodeKeyMismatch, says: "the app answers for its device alone",
		},
		"another master key": {
			vouch: func(verification *people.Verification, alice *people.Person, masterKey id.Ed25519) map[id.KeyID]string {
				return verification.OwnKeys(id.Ed25519(other))
			},
			code: event.VerificationCancelCodeKeyMismatch, says: "the keys do not match",
		},
		"another text for the master key": {
			vouch: func(verification *people.Verification, alice *people.Person, masterKey id.Ed25519) map[id.KeyID]string {
				keys := verification.OwnKeys(masterKey)
				keys[id.NewKeyID(id.KeyAlgorithmEd25519, masterKey.String())] = other
				return keys
			},
			code: event.VerificationCancelCodeSASMismatch, says: "the keys do not match",
		},
		"a third key": {
			vouch: func(verification *people.Verification, alice *people.Person, masterKey id.Ed25519) map[id.KeyID]string {
				keys := verification.OwnKeys(masterKey)
				keys[id.NewKeyID(id.KeyAlgorithmEd25519, other)] = other
				return keys
			},
			code: event.VerificationCancelCodeKeyMismatch, says: "the keys do not match",
		},
		"a wrong list": {
			vouch: func(verification *people.Verification, alice *people.Person, masterKey id.Ed25519) map[id.KeyID]string {
				return verification.OwnKeys(masterKey)
			},
			spoil: func(content map[string]any) { content["keys"] = other },
			code:  event.VerificationCancelCodeSASMismatch, says: "the keys do not match",
		},
	}
	for _, order := range []string{"before the operator", "after the operator"} {
		alice, masterKey := r.visitor(t, "alice")
		said := make(map[string]int)
		for name, c := range cases {
			ctx := within(t, 2*patience)
			verification := must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
			ok(t, verification.Reach(ctx))
			said["shown"]++
			ok(t, r.saysTimes(t, said["shown"], "Does the app of "+alice.UserID.String()))
			content := must(verification.Vouch(c.vouch(verification, alice, masterKey)))(t)
			if c.spoil != nil {
				c.spoil(content)
			}
			send := func() { ok(t, verification.Send(ctx, "mac", maps.Clone(content))) }
			confirm := func() { must(r.olga.Send(ctx, r.room, r.confirm(t, alice.UserID)))(t) }
			if order == "before the operator" {
				send()
				confirm()
			} else {
				confirm()
				must(verification.Wait(ctx, "mac"))(t)
				send()
			}
			r.cancelled(t, alice, verification.ID, c.code)
			said[c.says]++
			if err := r.saysTimes(t, said[c.says], alice.UserID.String(), c.says); err != nil {
				t.Errorf("%s, %s: %v", name, order, err)
			}
			if code := r.standing(t, alice); code != "unverified_identity" {
				t.Errorf("%s, %s: alice is %s after it", name, order, code)
			}
		}
	}
}

func TestOddEventsEndTheirVerificationAlone(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	cases := map[string]struct {
		at      string // after which step
		event   string
		content map[string]any
		code    event.VerificationCancelCode
		says    string
	}{
		"a MAC before the keys":         {"start", "mac", map[string]any{"mac": map[string]any{}, "keys": "AAAA"}, event.VerificationCancelCodeUnexpectedMessage, "something out of turn"},
		"a MAC before anything":         {"ready", "mac", map[string]any{"mac": map[string]any{}, "keys": "AAAA"}, event.VerificationCancelCodeUnexpectedMessage, "something out of turn"},
		"a key before anything":         {"ready", "key", map[string]any{"key": strings.Repeat("A", 43)}, event.VerificationCancelCodeUnexpectedMessage, "something out of turn"},
		"done before anything":          {"ready", "done", map[string]any{}, event.VerificationCancelCodeUnexpectedMessage, "something out of turn"},
		"ready, by who has asked":       {"ready", "ready", map[string]any{"from_device": "X", "methods": []string{"m.sas.v1"}}, event.VerificationCancelCodeUnexpectedMessage, "something out of turn"},
		"an accept that nobody needs":   {"start", "accept", map[string]any{"commitment": "AAAA"}, event.VerificationCancelCodeUnexpectedMessage, "something out of turn"},
		"a key that is none":            {"start", "key", map[string]any{"key": "AAAA"}, event.VerificationCancelCodeInvalidMessage, "something that makes no sense"},
		"a key of zeros":                {"start", "key", map[string]any{"key": strings.Repeat("A", 43)}, event.VerificationCancelCodeInvalidMessage, "something that makes no sense"},
		"a key that is a number":        {"start", "key", map[string]any{"key": 7}, event.VerificationCancelCodeInvalidMessage, "something that makes no sense"},
		"MACs that are a list":          {"keys", "mac", map[string]any{"mac": []string{"a"}, "keys": "AAAA"}, event.VerificationCancelCodeKeyMismatch, "the keys do not match"},
		"no MACs":                       {"keys", "mac", map[string]any{"mac": map[string]any{}, "keys": "AAAA"}, event.VerificationCancelCodeKeyMismatch, "the keys do not match"},
		"an empty MAC event":            {"keys", "mac", map[string]any{}, event.VerificationCancelCodeInvalidMessage, "something that makes no sense"},
		"a scan that nobody has shown":  {"ready", "start", map[string]any{"method": "m.reciprocate.v1", "secret": ""}, event.VerificationCancelCodeUnexpectedMessage, "something out of turn"},
		"a method that nobody knows":    {"ready", "start", map[string]any{"method": "x.unknown"}, event.VerificationCancelCodeUnknownMethod, "has no way to verify that I have, too"},
		"a choice of a thousand hashes": {"ready", "start", map[string]any{"method": "m.sas.v1", "hashes": make([]string, 1000)}, event.VerificationCancelCodeInvalidMessage, "something that makes no sense"},
		"nothing in common":             {"ready", "start", map[string]any{"method": "m.sas.v1", "hashes": []string{"md5"}}, event.VerificationCancelCodeUnknownMethod, "has no way to verify that I have, too"},
	}
	var alice *people.Person
	said := make(map[string]int)
	done := 0
	for name, c := range cases {
		if done%8 == 0 { // the bot looks at ten requests of one person an hour
			alice, _ = r.visitor(t, "alice")
			clear(said)
		}
		done++
		ctx := within(t, patience)
		verification := must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
		switch c.at {
		case "ready":
			must(verification.Wait(ctx, "ready"))(t)
		case "start":
			ok(t, verification.Start(ctx))
			must(verification.Wait(ctx, "accept"))(t)
		case "keys":
			ok(t, verification.Reach(ctx))
		}
		if c.event == "start" {
			c.content["from_device"] = alice.DeviceID
		}
		ok(t, verification.Send(ctx, c.event, c.content))
		content, err := verification.Wait(ctx, "cancel")
		if err != nil || content["code"] != string(c.code) {
			t.Errorf("%s: ended with %v (%v)", name, content, err)
		}
		said[c.says]++
		if err := r.saysTimes(t, said[c.says], alice.UserID.String(), c.says); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The bot has survived all of it, and nothing is left.
	r.order(t, "!trust confirm", "No verification is under way")
}

func TestStrangersDoNotDisturbAVerification(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	alice, masterKey := r.visitor(t, "alice")
	mallory, _ := r.visitor(t, "mallory")
	ctx := within(t, 2*patience)
	verification := must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	ok(t, verification.Start(ctx))
	must(verification.Wait(ctx, "accept"))(t)
	ok(t, verification.SendAs(ctx, mallory, "cancel", map[string]any{"code": "m.user", "reason": "no"}))
	r.notice(t, mallory.UserID.String()+" meddles in the verification with "+alice.UserID.String())
	second := theWorld(t).login(t, alice.UserID.String(), people.Options{})
	ok(t, second.WaitJoined(ctx, r.room, r.bot.UserID))
	ok(t, verification.SendAs(ctx, second, "cancel", map[string]any{"code": "m.user", "reason": "no"}))
	r.notice(t, "Somebody meddles in the verification with "+alice.UserID.String())
	ok(t, verification.ExchangeKeys(ctx))
	r.notice(t, "Does the app of "+alice.UserID.String())
	ok(t, verification.Send(ctx, "mac", must(verification.Vouch(verification.OwnKeys(masterKey)))(t)))
	r.order(t, r.confirm(t, alice.UserID), "is verified now")
}

func TestRequestsThatAreRefused(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	w := theWorld(t)
	ctx := within(t, 4*patience)

	t.Log("nobody vouches for the device")
	unsigned := w.newPerson(t, "unsigned")
	r.admit(t, unsigned)
	verification := must(unsigned.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	r.cancelled(t, unsigned, verification.ID, event.VerificationCancelCodeUser)
	r.notice(t, "That device does not belong to "+unsigned.UserID.String())

	t.Log("another device than the one that sends it")
	alice, _ := r.visitor(t, "alice")
	request := alice.VerificationRequest(r.bot.UserID)
	request["from_device"] = "OTHERDEVICE"
	eventID := must(alice.SendContent(ctx, r.room, request))(t)
	r.cancelled(t, alice, id.VerificationTransactionID(eventID), event.VerificationCancelCodeUser)
	r.notice(t, "names another device than the one that sent it", alice.UserID.String())

	t.Log("in the clear, with a device that is nobody's")
	eventID = must(alice.SendRaw(ctx, r.room, event.EventMessage.Type, request))(t)
	r.cancelled(t, alice, id.VerificationTransactionID(eventID), event.VerificationCancelCodeUser)
	r.notice(t, "That device does not belong to "+alice.UserID.String())

	t.Log("no way in common")
	request = alice.VerificationRequest(r.bot.UserID)
	request["methods"] = []string{"m.qr_code.show.v1", "m.reciprocate.v1"}
	eventID = must(alice.SendContent(ctx, r.room, request))(t)
	r.cancelled(t, alice, id.VerificationTransactionID(eventID), event.VerificationCancelCodeUser)
	r.notice(t, "The app of "+alice.UserID.String()+" has no way to verify that I have, too")

	t.Log("two at once")
	first := must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	must(first.Wait(ctx, "ready"))(t)
	again := must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	r.cancelled(t, alice, again.ID, event.VerificationCancelCodeUser)
	r.notice(t, "A verification with "+alice.UserID.String()+" is under way already")
	r.order(t, "!trust deny "+alice.UserID.String(), "has been called off")
	r.cancelled(t, alice, first.ID, event.VerificationCancelCodeUser)

	t.Log("the same message again")
	replayed := must(alice.Resend(ctx, r.room, id.EventID(first.ID)))(t)
	if answer := *must(r.olga.WaitForAnswer(ctx, replayed))(t); answer.Annotation.Code != "mismatched_sender" {
		t.Errorf("a repeated request was answered %+v", answer.Annotation)
	}

	t.Log("a request to somebody else")
	must(alice.SendContent(ctx, r.room, alice.VerificationRequest(r.olga.UserID)))(t)

	t.Log("a room that is not encrypted")
	open := newRoom(t, false, r.bot, alice)
	must(alice.SendRaw(ctx, open, event.EventMessage.Type, alice.VerificationRequest(r.bot.UserID)))(t)
	if notice := must(alice.WaitForNotice(ctx, open))(t); !contains(notice.Body, "I cannot verify with you in this room") {
		t.Errorf("in a room that is not encrypted the bot says: %s", notice.Body)
	}

	t.Log("an identity that is not the verified one")
	bella, bellaKey := r.visitor(t, "bella")
	r.order(t, "!trust verify "+bella.UserID.String()+" "+bellaKey.String(), "is verified now")
	must(bella.ResetIdentity(ctx))(t)
	bella.RotateSession(r.room)
	violation := must(bella.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	r.cancelled(t, bella, violation.ID, event.VerificationCancelCodeUser)
	r.notice(t, "The public key of "+bella.UserID.String()+" is not the one that was verified before", "!trust unverify "+bella.UserID.String())
	r.order(t, "!trust confirm", "No verification is under way")
}

// What changes between the comparison and the confirmation is noticed.
func TestVerificationIsAboutTheKeysOfItsBeginning(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	ctx := within(t, 4*patience)
	begin := func(name string) (*people.Person, *people.Verification, map[string]any) {
		person, masterKey := r.visitor(t, name)
		verification := must(person.RequestVerification(ctx, r.room, r.bot.UserID))(t)
		ok(t, verification.Reach(ctx))
		r.notice(t, "Does the app of "+person.UserID.String())
		return person, verification, must(verification.Vouch(verification.OwnKeys(masterKey)))(t)
	}

	alice, verification, mac := begin("alice")
	ok(t, verification.Send(ctx, "mac", mac))
	must(alice.ResetIdentity(ctx))(t)
	r.order(t, r.confirm(t, alice.UserID), "the account's public key has changed meanwhile")
	r.cancelled(t, alice, verification.ID, event.VerificationCancelCodeKeyMismatch)

	bella, verification, mac := begin("bella")
	r.order(t, r.confirm(t, bella.UserID), "has to confirm, too")
	must(bella.ResetIdentity(ctx))(t)
	settle(t, r.olga, r.room)
	ok(t, verification.Send(ctx, "mac", mac))
	r.notice(t, bella.UserID.String(), "the account's public key has changed meanwhile")
	r.cancelled(t, bella, verification.ID, event.VerificationCancelCodeKeyMismatch)

	carol, verification, mac := begin("carol")
	ok(t, verification.Send(ctx, "mac", mac))
	settle(t, r.olga, r.room)
	ok(t, carol.Logout(ctx))
	r.order(t, r.confirm(t, carol.UserID), "the device is not there any more")
}

func TestRequestsBetweenDevicesThatAreRefused(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	r := newDesk(t)
	ctx := within(t, 4*patience)
	device := r.botDevice(t)

	t.Log("no room with the bot")
	stranger, _ := w.newStranger(t, "stranger")
	ok(t, stranger.RequestDeviceVerification(ctx, r.bot.UserID, device, "m.first"))
	r.cancelled(t, stranger, "m.first", event.VerificationCancelCodeUser)

	t.Log("twice under one name")
	alice, _ := r.visitor(t, "alice")
	ok(t, alice.RequestDeviceVerification(ctx, r.bot.UserID, device, "m.twice"))
	must(alice.WaitForVerificationEvent(ctx, r.bot.UserID, "m.twice", "ready"))(t)
	ok(t, alice.RequestDeviceVerification(ctx, r.bot.UserID, device, "m.twice"))
	r.cancelled(t, alice, "m.twice", event.VerificationCancelCodeUnexpectedMessage)
	r.notice(t, "it was begun twice under one name", alice.UserID.String())

	t.Log("another device of the bot's own account")
	own := w.login(t, r.bot.UserID.String(), people.Options{})
	ok(t, own.RequestDeviceVerification(ctx, r.bot.UserID, device, "m.own"))
	r.cancelled(t, own, "m.own", event.VerificationCancelCodeUser)

	t.Log("nonsense")
	for _, name := range []string{"", strings.Repeat("x", 5000), "with a space", "with\x00nothing"} {
		ok(t, alice.RequestDeviceVerification(ctx, r.bot.UserID, device, id.VerificationTransactionID(name)))
	}
	for _, eventType := range []string{"request", "ready", "start", "accept", "key", "mac", "done", "cancel"} {
		ok(t, alice.SendVerificationToDevice(ctx, r.bot.UserID, device, eventType, map[string]any{"transaction_id": 7, "from_device": []string{"a"}}))
		ok(t, alice.SendVerificationToDevice(ctx, r.bot.UserID, device, eventType, map[string]any{"transaction_id": "m.unknown"}))
	}
	r.order(t, "!trust confirm", "No verification is under way")
}

func TestAtMostFiveVerificationsAreOpen(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	ctx := within(t, 4*patience)
	var last *people.Person
	for range 6 {
		last, _ = r.visitor(t, "guest")
		must(last.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	}
	r.notice(t, "I have no time for "+last.UserID.String(), "5 verifications are under way already")
	r.order(t, "!trust deny", "Which one do you mean?")
	r.order(t, "!trust verify "+last.UserID.String(), "5 verifications are under way already")
}

func TestOperatorsWhoDecide(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	zoe, zoeKey := w.newStranger(t, "zoe")
	r := newDesk(t, zoe.UserID)
	r.admit(t, zoe)
	alice, aliceKey := r.visitor(t, "alice")
	ctx := within(t, 4*patience)
	r.order(t, "!trust verify "+zoe.UserID.String()+" "+zoeKey.String(), "is verified now")

	t.Log("an operator whose key no configuration pins does not confirm for herself")
	verification := must(zoe.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	ok(t, verification.Reach(ctx))
	r.notice(t, "Does the app of "+zoe.UserID.String())
	own := must(zoe.Send(ctx, r.room, r.confirm(t, zoe.UserID)))(t)
	if answer := *must(r.olga.WaitForAnswer(ctx, own))(t); !contains(answer.Body, "You cannot confirm your own verification", "trust.verified_users") {
		t.Errorf("zoe was told: %s", answer.Body)
	}
	r.order(t, "!trust deny", "what the app shows is something else")

	t.Log("nobody else's word counts")
	verification = must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	ok(t, verification.Reach(ctx))
	notice := r.notice(t, "Does the app of "+alice.UserID.String())
	confirm := r.confirm(t, alice.UserID)
	for _, words := range []string{confirm, "!trust deny"} {
		answer := *must(r.olga.WaitForAnswer(ctx, must(alice.Send(ctx, r.room, words))(t)))(t)
		if !contains(answer.Body, "That is for the operators of this bot") {
			t.Errorf("alice was told: %s", answer.Body)
		}
	}

	t.Log("reactions")
	must(r.olga.SendReaction(ctx, r.room, notice.EventID, "✅"))(t)
	r.notice(t, "A reaction is not enough", confirm)
	must(r.olga.SendEncryptedReaction(ctx, r.room, notice.EventID, "❌\ufe0f"))(t)
	r.notice(t, "A reaction is not enough", "!trust deny "+alice.UserID.String())

	t.Log("an operator's confirmation of one verification, kept back until the next one")
	r.order(t, "!trust deny", "has failed: what the app shows is something else", alice.UserID.String())
	r.cancelled(t, alice, verification.ID, event.VerificationCancelCodeSASMismatch)
	verification = must(alice.RequestVerification(ctx, r.room, r.bot.UserID))(t)
	ok(t, verification.Reach(ctx))
	ok(t, r.saysTimes(t, 2, "Does the app of "+alice.UserID.String()))
	ok(t, verification.Send(ctx, "mac", must(verification.Vouch(verification.OwnKeys(aliceKey)))(t)))
	r.order(t, confirm, "Nothing that is under way has the code")
	if code := r.standing(t, alice); code != "unverified_identity" {
		t.Errorf("after an old confirmation, alice is %s", code)
	}
	r.order(t, "!trust deny", "has failed")

	t.Log("a reply to the notice")
	bella, _ := r.visitor(t, "bella")
	for _, person := range []*people.Person{alice, bella} {
		verification = must(person.RequestVerification(ctx, r.room, r.bot.UserID))(t)
		ok(t, verification.Reach(ctx))
		notice = r.notice(t, "Does the app of "+person.UserID.String())
	}
	// A server can change what a message replies to.
	unnamed := must(r.olga.SendReply(ctx, r.room, notice.EventID, "!trust confirm"))(t)
	if answer := *must(r.olga.WaitForAnswer(ctx, unnamed))(t); !contains(answer.Body, "Please add the code that I have shown") {
		t.Errorf("a reply that does not say what it confirms was answered: %s", answer.Body)
	}
	reply := must(r.olga.SendReply(ctx, r.room, notice.EventID, "!trust deny"))(t)
	if answer := *must(r.olga.WaitForAnswer(ctx, reply))(t); !contains(answer.Body, "has failed", bella.UserID.String()) {
		t.Errorf("a reply to the notice about bella was answered: %s", answer.Body)
	}
	audit := r.order(t, "!trust audit 100", "entries")
	for _, line := range []string{own.String(), "a reaction", "not_operator"} {
		if !strings.Contains(audit.Body, line) {
			t.Errorf("the audit table does not have %s: %s", line, audit.Body)
		}
	}
}

// A direct chat with the person, where no operator is: they are told where the bot meets them.
func TestOperatorsInAnotherRoomAreTold(t *testing.T) {
	t.Parallel()
	r := newDesk(t)
	w := theWorld(t)
	alice, masterKey := w.newStranger(t, "alice")
	direct := newRoom(t, true, r.bot, alice)
	ctx := within(t, 4*patience)
	r.order(t, "!trust verify "+alice.UserID.String(), "I have asked "+alice.UserID.String())
	r.order(t, "!trust deny", "has been called off")
	verification := must(alice.RequestVerification(ctx, direct, r.bot.UserID))(t)
	ok(t, verification.Reach(ctx))
	r.notice(t, "Does the app of "+alice.UserID.String())
	ok(t, verification.Send(ctx, "mac", must(verification.Vouch(verification.OwnKeys(masterKey)))(t)))
	r.order(t, r.confirm(t, alice.UserID), "is verified now")
	done := func(notices []people.Notice) bool {
		for _, notice := range notices {
			if contains(notice.Body, "is verified now") {
				return true
			}
		}
		return false
	}
	ok(t, alice.WaitForNotices(ctx, direct, done))
}

// An operator whose key the configuration pins verifies the bot, by Element, with their own confirmation.
func TestPinnedOperatorVerifiesTheBotAlone(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	r := new(registry)
	ctx := within(t, 4*patience)
	r.alice = w.newElement(t, "alice")
	r.aliceKey = must(r.alice.BootstrapCrossSigning(ctx))(t)
	r.bot = w.newBot(t, func(config botproc.Config) {
		pin(config, r.alice.UserID(), r.aliceKey)
		config["trust"].(botproc.Config)["operators"] = []id.UserID{r.alice.UserID()}
	})
	r.olga, _ = w.newStranger(t, "olga")
	r.room = newRoom(t, true, r.bot, r.olga)
	r.join(t, r.alice)
	verification := r.requestAs(t, r.alice.UserID())
	ok(t, r.alice.StartSAS(ctx, verification))
	must(r.alice.Emojis(ctx, verification))(t)
	ok(t, r.alice.ConfirmEmojis(ctx, verification))
	r.notice(t, "Does the app of "+r.alice.UserID().String())
	confirm := must(r.alice.Send(ctx, r.room, r.confirm(t, r.alice.UserID())))(t)
	if answer := *must(r.olga.WaitForAnswer(ctx, confirm))(t); !contains(answer.Body, "is verified now") {
		t.Errorf("the operator was told: %s", answer.Body)
	}
	if ended := must(r.alice.WaitForPhase(ctx, verification, "done"))(t); ended.Phase != "done" {
		t.Errorf("Element says: %+v", ended)
	}
	r.expectStanding(t)
}
